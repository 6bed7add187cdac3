"What the pipeline tests of transformers call for a model; its source distribution has none for images."

from base64 import b64encode
from pathlib import Path

from PIL import Image
from transformers import pipeline

from .. import parts


def chat(image=None, text="What is it?", **image_part):
    "A question, with an image named by a part of its own, or by `image_url` as OpenAI's clients do."
    image_part = image_part or (dict(type="image", image=image) if image is not None else None)
    content = [image_part] if image_part else []
    return [dict(role="user", content=[*content, dict(type="text", text=text)])]


def text_of(answers):
    return answers[0]["generated_text"]


class ImageTextToTextPipelineTests:
    task = "image-text-to-text"

    def get_test_pipeline(
        self, model, tokenizer, processor=None, image_processor=None, dtype="float32", **others
    ):
        pipe = pipeline(self.task, model=model, processor=processor, dtype=dtype, max_new_tokens=3)
        prompt = processor.apply_chat_template(chat(image="x"), add_generation_prompt=True, tokenize=False)
        return pipe, [dict(images=file, text=prompt) for file in parts.pictures()]

    def run_pipeline_test(self, pipe, examples):
        first = parts.pictures()[0]
        encoded = "data:image/png;base64," + b64encode(Path(first).read_bytes()).decode()
        openai = dict(type="image_url", image_url=dict(url=encoded))
        forms = [chat(type="image", url=first), chat(type="image", path=first)]
        forms += [chat(type="image", base64=encoded), chat(Image.open(first)), chat(**openai)]
        wanted = text_of(pipe(text=chat(first), return_full_text=False))
        for form in forms:
            assert text_of(pipe(text=form, return_full_text=False)) == wanted, form
        assert text_of(pipe(**examples[0], return_full_text=False)) == wanted
        assert text_of(pipe(text=chat(first)))[-1] == dict(role="assistant", content=wanted)
        both = pipe(text=[chat(first), chat(parts.pictures()[1])], batch_size=2)
        assert len(both) == 2
        assert text_of(pipe(text=chat(), return_full_text=False)) is not None


class AnyToAnyPipelineTests(ImageTextToTextPipelineTests):
    task = "any-to-any"
