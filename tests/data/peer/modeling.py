"Transformers' common tests of models and pipelines, on LLaVA or on ours."

import os
import unittest

import torch
from transformers import LlavaModel

from . import parts

os.environ["TRANSFORMERS_TINY_MODEL_PATH"] = parts.save_tiny_model()

from . import test_pipeline_mixin as pipelines  # noqa: E402  reads the variable
from .test_configuration_common import ConfigTester  # noqa: E402
from .test_modeling_common import (  # noqa: E402
    GenerationTesterMixin,
    ModelTesterMixin,
    floats_tensor,
    ids_tensor,
)

setattr(pipelines.transformers_module, parts.PROCESSOR.__name__, parts.PROCESSOR)


class Tester:
    "Sizes and inputs."

    batch_size = 7  # that of the tests which would fill up a smaller one with random rows
    is_training = True
    num_hidden_layers = 2
    num_attention_heads = 4
    hidden_size = 32
    vocab_size = 99
    image_size = parts.SIDE
    num_image_tokens = parts.IMAGE_TOKENS
    seq_length = encoder_seq_length = 7 + parts.IMAGE_TOKENS

    def __init__(self, parent):
        self.parent = parent

    def get_config(self):
        return parts.config()

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        pixels = floats_tensor([self.batch_size, 3, self.image_size, self.image_size])
        input_ids = (
            ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 3) + 3
        )  # no image by chance
        input_ids[:, : self.num_image_tokens] = config.image_token_id
        inputs = dict(pixel_values=pixels, input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        if parts.READS_QUESTION:
            inputs["question_ids"] = ids_tensor([self.batch_size, 5], 60) + 3
            inputs["question_mask"] = torch.ones_like(inputs["question_ids"])
        return config, inputs


class ModelTest(ModelTesterMixin, GenerationTesterMixin, pipelines.PipelineTesterMixin, unittest.TestCase):
    all_model_classes = (LlavaModel, parts.MODEL) if parts.LLAVA else (parts.MODEL,)
    pipeline_model_mapping = {"image-text-to-text": parts.MODEL, "any-to-any": parts.MODEL}
    additional_model_inputs = ["pixel_values", "question_ids", "question_mask"]
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = Tester(self)
        common = ["image_token_index", "vision_feature_layer", "image_seq_length"]
        self.config_tester = ConfigTester(
            self, config_class=parts.CONFIG, has_text_modality=False, common_properties=common
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def _image_features_prepare_config_and_inputs(self):
        config, inputs = super()._image_features_prepare_config_and_inputs()
        whole = self.model_tester.prepare_config_and_inputs_for_common()[1]
        return config, inputs | {name: ids for name, ids in whole.items() if name.startswith("question")}
