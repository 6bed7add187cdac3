"Transformers' common tests of processors, on LLaVA's or on ours."

import unittest

from tiny_vlm import byte_tokenizer

from . import parts
from . import test_processing_common as common

common.MODALITY_INPUT_DATA["images"] = parts.pictures()
common.url_to_local_path = lambda url: parts.pictures()[0]  # nothing is fetched


class ProcessorTest(common.ProcessorTesterMixin, unittest.TestCase):
    processor_class = parts.PROCESSOR

    @classmethod
    def _setup_tokenizer(cls):
        return byte_tokenizer()

    @classmethod
    def _setup_image_processor(cls):
        return parts.image_processor()

    @staticmethod
    def prepare_processor_dict():
        return parts.processor_options()

    def prepare_text_inputs(self, batch_size=None, modalities=None):
        texts = super().prepare_text_inputs(batch_size, modalities)
        if not parts.READS_QUESTION:
            return texts
        return f"USER: {texts}" if isinstance(texts, str) else [f"USER: {text}" for text in texts]
