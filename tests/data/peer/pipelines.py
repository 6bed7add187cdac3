"""What the pipeline tests of transformers call for each model; those for images and texts are not in its source
distribution."""

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


class ImageTextToTextPipelineTests:
    task = "image-text-to-text"

    def get_test_pipeline(
        self, model, tokenizer, processor=None, image_processor=None, dtype="float32", **others
    ):
        pipe = pipeline(self.task, model=model, processor=processor, dtype=dtype, max_new_tokens=3)
        return pipe, [chat(file) for file in parts.pictures()]

    def run_pipeline_test(self, pipe, examples):
        first = parts.pictures()[0]
        encoded = "data:image/png;base64," + b64encode(Path(first).read_bytes()).decode()
        openai = dict(type="image_url", image_url=dict(url=encoded))
        forms = [
            chat(type="image", url=first),
            chat(type="image", path=first),
            chat(type="image", base64=encoded),
        ]
        forms += [chat(Image.open(first)), chat(**openai)]
        wanted = pipe(text=examples[0], return_full_text=False)[0]["generated_text"]
        for form in forms:
            assert pipe(text=form, return_full_text=False)[0]["generated_text"] == wanted, form
        prompt = pipe.processor.apply_chat_template(examples[0], add_generation_prompt=True, tokenize=False)
        assert pipe(images=first, text=prompt, return_full_text=False)[0]["generated_text"] == wanted
        assert pipe(text=examples[0])[0]["generated_text"][-1] == dict(role="assistant", content=wanted)
        both = pipe(text=examples, batch_size=2)
        assert [len(answer) for answer in both] == [1, 1]
        assert pipe(text=chat(), return_full_text=False)[0]["generated_text"] is not None


class AnyToAnyPipelineTests(ImageTextToTextPipelineTests):
    task = "any-to-any"
