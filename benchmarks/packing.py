"""Packing against padding, on the lengths of a mix like LLaVA's 665k: tokens that are computed, counted;
and the time of a training pass, measured.

    python benchmarks/packing.py    # assumed lengths; writes runs/packing.json
    python benchmarks/packing.py --data llava_v1_5_mix665k.json --llm hub:lmsys/vicuna-7b-v1.5

Without the real file the lengths are drawn from `PARTS`: the composition of the mix is published, the
length of its rows is assumed. Because the result depends on it, tokens are counted for other assumptions
as well.

Tokens: every batch of the epoch as the model gets it from `Collator`: rows × longest row, padding
included; packed, as many sequences of one length up to `max_length` as hold the rows with the least
padding. Time: forward and backward of a small random Llama on the same rows, padded and packed one after
the other, in an order that alternates; both losses are compared first. All lengths are divided by
`scale`, because the model is narrow as well: with width 256 and scale 8, attention takes 1/6 of the work
of the longest row (in a 7B LLM 1/12). On a CPU the time is that of the process on one thread, which
other work on the machine affects only through caches and clock rates. On a GPU each batch runs once before
it is timed, since new shapes allocate memory and select kernels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter, process_time
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, ProcessorMixin
from transformers.trainer_pt_utils import LengthGroupedSampler

from delta_llava.adapter import CLIPImageProcessorPil, selected_logits
from delta_llava.assets import resolve
from delta_llava.collator import Collator, pack_rows
from delta_llava.conversations import check_turns, read_rows, training_turns
from delta_llava.processor import as_messages, build_processor
from delta_llava.runs import write_record

CUDA = torch.cuda.is_available()
read_clock = perf_counter if CUDA else process_time
ROWS = 665_298  # Of the mix
TEXT_ONLY = 40_688  # Those of them that have no image
PROMPT = 42  # Tokens that every row has: the template's first words, roles, line breaks
TEXT = "text alone: ShareGPT"
# Published: thousands of rows (LLaVA-1.5, table of its data).
# Assumed: median of the text's tokens without PROMPT, and the standard deviation of their logarithm.
PARTS = {
    "LLaVA conversations": (58, 250, 0.35),  # several questions, answers of a sentence or two
    "LLaVA descriptions": (23, 130, 0.25),  # one answer of some hundred words
    "LLaVA reasoning": (77, 180, 0.3),  # the same, with a longer question
    "VQAv2, merged": (83, 110, 0.5),  # some five questions about an image, answers of a word
    "GQA, merged": (72, 250, 0.6),  # the same, a dozen of them
    "OKVQA, A-OKVQA": (9 + 66, 60, 0.3),  # one question, with choices or a word on the form of the answer
    "OCRVQA": (80, 120, 0.4),  # some five questions about a book's cover
    "TextCaps": (22, 80, 0.5),  # words read in the image, and one sentence
    "RefCOCO": (48, 300, 0.6),  # up to ten boxes, each of four numbers
    "Visual Genome regions": (86, 500, 0.3),  # ten boxes
}


Lengths = tuple[np.ndarray, np.ndarray, np.ndarray]  # Text tokens of each row, has it an image, its part


def assumed(rows: int, seed: int, text: tuple[float, float] = (1100, 1.0), scale: float = 1.0) -> Lengths:
    "Lengths drawn from `PARTS`; `text` is the part without images, `scale` is of all standard deviations."
    rng = np.random.default_rng(seed)
    share = np.array([n for n, _, _ in PARTS.values()], float)
    share *= (1 - TEXT_ONLY / ROWS) / share.sum()
    names = np.array([TEXT, *PARTS])
    probabilities = np.array([TEXT_ONLY / ROWS, *share])
    medians = np.array([text[0], *(median for _, median, _ in PARTS.values())])
    deviations = scale * np.array([text[1], *(deviation for _, _, deviation in PARTS.values())])
    part = rng.choice(len(names), rows, p=probabilities)
    noise = rng.standard_normal(rows)
    tokens = np.exp(np.log(medians[part]) + deviations[part] * noise).astype(int)
    return PROMPT + tokens, part > 0, names[part]


def measured(file: Path, llm: str, template: str) -> Lengths:
    "Lengths of a file; its rows are of two parts, with an image and without."
    tokenizer = AutoTokenizer.from_pretrained(resolve(llm).path, trust_remote_code=False)
    processor = build_processor(CLIPImageProcessorPil(), tokenizer, tokens=1, template=template)
    lengths = []
    images = []
    for n, (row, _) in enumerate(tqdm(read_rows(file), desc="lengths", unit=" rows")):
        try:
            marks, _ = check_turns(row.get("conversations"))
        except ValueError as e:
            raise ValueError(f"row {n} of {file}: {e}") from e
        prompt = processor.apply_chat_template(as_messages(training_turns(row["conversations"])))
        lengths.append(len(processor.tokenizer(prompt).input_ids) - marks)
        images.append(marks > 0)
    has_image = np.array(images)
    return np.array(lengths), has_image, np.where(has_image, "with an image", "text alone")


def in_batches(lengths: list[int], size: int, grouped: bool, seed: int) -> Iterator[list[int]]:
    "Row numbers of each batch, shuffled as `Trainer` does it; the last batch may be short."
    torch.manual_seed(seed)
    if grouped:
        order = list(LengthGroupedSampler(size, lengths=lengths))
    else:
        order = torch.randperm(len(lengths)).tolist()
    return (order[i : i + size] for i in range(0, len(order), size))


def padded_and_packed(lengths: list[int], batches: Iterator[list[int]], max_length: int) -> tuple[int, int]:
    "Tokens of all batches, padded and packed: sequences × their length."
    padded = packed = 0
    for batch in batches:
        rows = [lengths[i] for i in batch]
        sequences = [sum(rows[i] for i in shared) for shared in pack_rows(rows, max_length)]
        padded += len(rows) * max(rows)
        packed += len(sequences) * max(sequences)
    return padded, packed


def count(lengths: np.ndarray, size: int, seed: int, max_length: int) -> dict:
    "Tokens of an epoch for each way to make batches, and what that means for padding."
    every = lengths.tolist()
    tokens = dict(rows=sum(every))
    for grouped, names in ((False, ("padded", "packed")), (True, ("grouped", "grouped, packed"))):
        batches = in_batches(every, size, grouped, seed)
        tokens |= zip(names, padded_and_packed(every, batches, max_length), strict=True)
    ways = [way for way in tokens if way != "rows"]
    return dict(
        tokens=tokens,
        padding={way: round(1 - tokens["rows"] / tokens[way], 4) for way in ways},
        times_fewer={way: round(tokens["padded"] / tokens[way], 3) for way in ways},
    )


class LengthProcessor(ProcessorMixin):
    "A processor whose conversations are numbers: so many tokens."

    questions = False
    placeholders = None
    tokenizer = SimpleNamespace(pad_token_id=0)
    image_token_id = -1

    def __init__(self):
        pass

    def num_image_tokens(self, tokens=None):
        return 1

    def tokenize_conversation(self, n):
        ids = [1 + i % 500 for i in range(n)]
        return dict(input_ids=ids, labels=[-100, *ids[1:]])  # a row's first token is never an answer


def collators(max_length: int) -> dict[str, Collator]:
    "Ours, on rows that are lengths."
    return {
        way: Collator(processor=LengthProcessor(), max_length=max_length, packing=way == "packed")
        for way in ("padded", "packed")
    }


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def one_pass(llm: LlamaForCausalLM, batch: dict) -> tuple[float, float]:
    "Seconds of a forward and a backward pass, and the loss."
    batch = {k: v.to(llm.device) for k, v in batch.items()}
    target = batch.pop("labels")[:, 1:]
    supervised = target != -100
    synchronize()
    start = read_clock()
    logits, _ = selected_logits(llm, lambda hidden: hidden[:, :-1][supervised], **batch, use_cache=False)
    loss = llm.loss_function(
        logits=logits, labels=None, shift_labels=target[supervised], vocab_size=llm.vocab_size
    )
    loss.backward()
    synchronize()
    seconds = read_clock() - start
    llm.zero_grad()
    return seconds, loss.item()


def speedup(padded: list[float], packed: list[float], seed: int) -> dict:
    "Ratio of the sums over all batches, its 90 % bootstrap interval, and the ratio of each batch."
    before = np.array(padded)
    after = np.array(packed)
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(before), size=(4000, len(before)))
    low, high = np.quantile(before[draws].sum(1) / after[draws].sum(1), (0.05, 0.95))
    return dict(
        ratio=round(before.sum() / after.sum(), 3),
        interval=[round(low, 3), round(high, 3)],
        batches=[round(ratio, 3) for ratio in np.sort(before / after)],
    )


def quantiles(lengths: np.ndarray, max_length: int) -> dict:
    "A summary of row lengths, cut at the longest."
    lengths = np.minimum(lengths, max_length)
    found = {f"{q}%": int(np.quantile(lengths, q / 100)) for q in (5, 25, 50, 75, 95)}
    at_max = float((lengths == max_length).mean())
    return found | dict(mean=round(float(lengths.mean()), 1), at_max_length=round(at_max, 3))


@dataclass
class Packing:
    data: Path | None = None  # Conversations; without it the lengths are assumed
    llm: str = "hub:lmsys/vicuna-7b-v1.5"  # Whose tokenizer reads that file
    template: str = "v1"  # Chat template of that file's rows
    rows: int = ROWS  # Rows that are drawn, if the lengths are assumed
    tokens: tuple[int, ...] = (576, 144, 64, 16, 1)  # Budgets V
    timed: tuple[int, ...] = (576, 144, 16)  # Budgets V of the timing; none leaves it out
    batches: int = 24  # Batches that are timed, for each budget
    batch_size: int = 16  # Rows in a batch: the paper's of stage 2, on one GPU
    max_length: int = 2048  # Most tokens of a row
    scale: int = 8  # Lengths are divided by it for the timing
    hidden: int = 256  # Width of the timed LLM
    layers: int = 4  # Its depth
    seed: int = 0  # Of lengths, order, weights
    record: Path = Path("runs/packing.json")

    def __post_init__(self):
        if min(self.rows, self.batches, self.scale) < 1 or self.batch_size < 2:
            raise ValueError(
                f"rows={self.rows}, batches={self.batches}, scale={self.scale} must be at least "
                f"1, batch_size={self.batch_size} 2."
            )

    def count(self, lengths: np.ndarray) -> dict:
        return count(np.minimum(lengths, self.max_length), self.batch_size, self.seed, self.max_length)

    def variants(self) -> dict[str, dict]:
        "Tokens at 144 under other assumptions than those of `PARTS`."
        options = {
            "all lengths half as spread": dict(scale=0.5),
            "all lengths 1.5 times as spread": dict(scale=1.5),
            "text alone half as long": dict(text=(550, 1.0)),
            "text alone as short as the rest": dict(text=(200, 0.5)),
        }
        found = {}
        for name, option in tqdm(options.items(), desc="other assumptions"):
            text, image, _ = assumed(self.rows // 8, self.seed, **option)
            found[name] = self.count(text + 144 * image)
            self.report(f"144, {name}", found[name])
        return found

    def report(self, name, found: dict):
        "Print one count."
        ways = []
        for way, padding in found["padding"].items():
            ways.append(f"{way}: {padding:.0%} padding, {found['times_fewer'][way]:.2f}×")
        tqdm.write(f"V={name}: {', '.join(ways)}")

    def small_llm(self) -> LlamaForCausalLM:
        "A random Llama to time."
        torch.manual_seed(self.seed)
        config = LlamaConfig(
            vocab_size=512,
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            intermediate_size=round(2.6875 * self.hidden),
            num_attention_heads=self.hidden // 64 or 1,
        )
        with torch.device("cuda" if CUDA else "cpu"):
            llm = LlamaForCausalLM(config)
        return llm.to(torch.bfloat16 if CUDA else torch.float32)

    def batches_to_time(self, lengths: np.ndarray) -> Iterator[dict[str, dict]]:
        "The same rows as a padded and as a packed batch; one more than are timed, which warms up."
        made = collators(self.max_length // self.scale)
        order = in_batches(lengths.tolist(), self.batch_size, False, self.seed + 1)
        for numbers in tqdm(list(islice(order, self.batches + 1))):
            rows = []
            for i in numbers:
                length = max(2, round(lengths[i] / self.scale))
                rows.append(dict(id=int(i), image=None, conversations=length))
            yield {way: collator(rows) for way, collator in made.items()}

    def time(self, tokens: int, lengths: np.ndarray) -> dict:
        "Padded and packed passes over the same batches, on one thread of the CPU or on the GPU."
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        llm = self.small_llm()
        seconds: dict[str, list[float]] = dict(padded=[], packed=[])
        counted = dict(padded=0, packed=0)
        for n, made in enumerate(self.batches_to_time(lengths)):
            for way in made if CUDA else ():
                one_pass(llm, made[way])
            order = ("padded", "packed") if n % 2 else ("packed", "padded")
            done = {way: one_pass(llm, made[way]) for way in order}
            tolerance = 1e-2 if CUDA else 1e-4
            torch.testing.assert_close(done["packed"][1], done["padded"][1], rtol=tolerance, atol=0)
            for way in seconds if n else ():
                seconds[way].append(done[way][0])
                counted[way] += made[way]["input_ids"].numel()
        torch.set_num_threads(threads)
        return dict(
            visual_tokens=tokens,
            seconds={way: round(sum(some), 2) for way, some in seconds.items()},
            token_ratio=round(counted["padded"] / counted["packed"], 3),
            **speedup(seconds["padded"], seconds["packed"], self.seed),
        )

    def describe(self, text: np.ndarray, part: np.ndarray) -> dict[str, dict]:
        "Quantiles of the text tokens of each part and of all rows, which are printed, too."
        summary = {}
        for name in dict.fromkeys(part.tolist()):
            chosen = text[part == name]
            summary[name] = dict(rows=len(chosen), **quantiles(chosen, self.max_length))
        summary["all"] = dict(rows=len(text), **quantiles(text, self.max_length))
        print("text tokens of a row, " + ("as in the file" if self.data else "ASSUMED, not measured"))
        for name, q in summary.items():
            print(f"  {name:24} " + "  ".join(f"{k} {v}" for k, v in q.items()))
        return summary

    def __call__(self):
        lengths = measured(self.data, self.llm, self.template) if self.data else assumed(self.rows, self.seed)
        text, has_image, part = lengths
        result = dict(
            lengths="measured" if self.data else "assumed",
            text_tokens=self.describe(text, part),
            counted=[],
            counted_at_144_if={},
            timed=[],
        )
        for tokens in self.tokens:
            found = self.count(text + tokens * has_image)
            self.report(tokens, found)
            result["counted"].append(dict(visual_tokens=tokens) | found)
        if self.tokens and not self.data:
            result["counted_at_144_if"] = self.variants()
        for tokens in self.timed:
            found = self.time(tokens, np.minimum(text + tokens * has_image, self.max_length))
            result["timed"].append(found)
            print(
                f"V={tokens}: packed passes are {found['ratio']:.2f}× as fast as padded ones [90 %: "
                f"{found['interval'][0]:.2f}–{found['interval'][1]:.2f}], with "
                f"{found['token_ratio']:.2f}× fewer tokens"
            )
            self.write(result, len(text))
        self.write(result, len(text))
        print(f"wrote {self.record}")

    def write(self, result: dict, rows: int):
        "The record, after every budget."
        names = ("batch_size", "max_length", "batches", "scale", "hidden", "layers")
        clock = "wall, bfloat16" if CUDA else "CPU time of the process, one thread, float32"
        settings = {name: getattr(self, name) for name in names}
        write_record(self.record, [self.seed], result, rows=rows, clock=clock, **settings)


if __name__ == "__main__":
    tyro.cli(Packing)()
