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
other work on the machine affects only through caches and clock rates.
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
ROWS, TEXT_ONLY = 665_298, 40_688
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


def assumed(rows, seed, text=(1100, 1.0), scale=1.0):
    "Text tokens of each row, whether it has an image, its part; `scale` is of all standard deviations."
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


def measured(file, llm, template):
    "The same of a file; its rows are of two parts, with an image and without."
    tokenizer = AutoTokenizer.from_pretrained(resolve(llm).path, trust_remote_code=False)
    processor = build_processor(CLIPImageProcessorPil(), tokenizer, tokens=1, template=template)
    lengths, images = [], []
    for n, (row, _) in enumerate(tqdm(read_rows(file), desc="lengths", unit=" rows")):
        try:
            marks, _ = check_turns(row.get("conversations"))
        except ValueError as e:
            raise ValueError(f"row {n} of {file}: {e}") from e
        prompt = processor.apply_chat_template(as_messages(training_turns(row["conversations"])))
        lengths.append(len(processor.tokenizer(prompt).input_ids) - marks)
        images.append(marks > 0)
    images = np.array(images)
    return np.array(lengths), images, np.where(images, "with an image", "text alone")


def in_batches(lengths, size, grouped, seed) -> Iterator[list[int]]:
    "Row numbers of each batch, shuffled as `Trainer` does it; the last batch may be short."
    torch.manual_seed(seed)
    if grouped:
        order = list(LengthGroupedSampler(size, lengths=lengths))
    else:
        order = torch.randperm(len(lengths)).tolist()
    return (order[i : i + size] for i in range(0, len(order), size))


def count(lengths, size, seed, max_length):
    "Tokens of an epoch for each way to make batches: sequences × their length, summed over the batches."
    lengths = lengths.tolist()
    found = dict(rows=sum(lengths))
    for grouped in (False, True):
        padded = packed = 0
        for batch in in_batches(lengths, size, grouped, seed):
            one = [lengths[i] for i in batch]
            sequences = [sum(one[i] for i in shared) for shared in pack_rows(one, max_length)]
            padded += len(one) * max(one)
            packed += len(sequences) * max(sequences)
        found["grouped" if grouped else "padded"] = padded
        found["grouped, packed" if grouped else "packed"] = packed
    ways = [k for k in found if k != "rows"]
    padding = {k: round(1 - found["rows"] / found[k], 4) for k in ways}
    return dict(
        tokens=found, padding=padding, times_fewer={k: round(found["padded"] / found[k], 3) for k in ways}
    )


class Lengths(ProcessorMixin):
    "A processor whose conversations are numbers: so many tokens."

    questions, placeholders, tokenizer = False, None, SimpleNamespace(pad_token_id=0)
    image_token_id = -1

    def __init__(self):
        pass

    def num_image_tokens(self, tokens=None):
        return 1

    def tokenize_conversation(self, n):
        ids = [1 + i % 500 for i in range(n)]
        return dict(input_ids=ids, labels=[-100, *ids[1:]])  # a row's first token is never an answer


def collators(max_length):
    "Ours, on rows that are lengths."
    return {
        way: Collator(processor=Lengths(), max_length=max_length, packing=way == "packed")
        for way in ("padded", "packed")
    }


def one_pass(llm, batch):
    "Seconds of a forward and a backward pass, and the loss."
    batch = {k: v.to(llm.device) for k, v in batch.items()}
    target = batch.pop("labels")[:, 1:]
    supervised = target != -100
    if CUDA:
        torch.cuda.synchronize()
    start = read_clock()
    logits, _ = selected_logits(llm, lambda hidden: hidden[:, :-1][supervised], **batch, use_cache=False)
    loss = llm.loss_function(
        logits=logits, labels=None, shift_labels=target[supervised], vocab_size=llm.vocab_size
    )
    loss.backward()
    if CUDA:
        torch.cuda.synchronize()
    seconds = read_clock() - start
    llm.zero_grad()
    return seconds, loss.item()


def speedup(padded, packed, seed):
    "Ratio of the sums over all batches, its 90 % bootstrap interval, and the ratio of each batch."
    padded, packed, rng = np.array(padded), np.array(packed), np.random.default_rng(seed)
    draws = rng.integers(len(padded), size=(4000, len(padded)))
    low, high = np.quantile(padded[draws].sum(1) / packed[draws].sum(1), (0.05, 0.95))
    return dict(
        ratio=round(padded.sum() / packed.sum(), 3),
        interval=[round(low, 3), round(high, 3)],
        batches=[round(r, 3) for r in np.sort(padded / packed)],
    )


def quantiles(lengths, max_length):
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

    def count(self, lengths):
        return count(np.minimum(lengths, self.max_length), self.batch_size, self.seed, self.max_length)

    def variants(self):
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

    def report(self, name, found):
        "Print one count."
        ways = [
            f"{k}: {found['padding'][k]:.0%} padding, {found['times_fewer'][k]:.2f}×"
            for k in found["padding"]
        ]
        tqdm.write(f"V={name}: {', '.join(ways)}")

    def small_llm(self):
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

    def time(self, tokens, lengths):
        "Padded and packed passes over the same batches, on one thread of the CPU or on the GPU."
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        llm, collate = self.small_llm(), collators(self.max_length // self.scale)
        seconds, counted = dict(padded=[], packed=[]), dict(padded=0, packed=0)
        batches = islice(
            in_batches(lengths.tolist(), self.batch_size, False, self.seed + 1), self.batches + 1
        )
        bar = tqdm(list(batches), desc=f"time at V={tokens}")
        for n, numbers in enumerate(bar):  # the first one warms up
            rows = [
                dict(id=int(i), image=None, conversations=max(2, round(lengths[i] / self.scale)))
                for i in numbers
            ]
            made = {way: c(rows) for way, c in collate.items()}
            done = {
                way: one_pass(llm, made[way])
                for way in (("padded", "packed") if n % 2 else ("packed", "padded"))
            }
            torch.testing.assert_close(
                done["packed"][1], done["padded"][1], rtol=1e-2 if CUDA else 1e-4, atol=0
            )
            for way in seconds if n else ():
                seconds[way].append(done[way][0])
                counted[way] += made[way]["input_ids"].numel()
        torch.set_num_threads(threads)
        found = dict(
            visual_tokens=tokens,
            seconds={k: round(sum(s), 2) for k, s in seconds.items()},
            token_ratio=round(counted["padded"] / counted["packed"], 3),
            **speedup(**seconds, seed=self.seed),
        )
        tqdm.write(
            f"V={tokens}: packed passes are {found['ratio']:.2f}× as fast as padded ones [90 %: "
            f"{found['interval'][0]:.2f}–{found['interval'][1]:.2f}], with "
            f"{found['token_ratio']:.2f}× fewer tokens"
        )
        return found

    def __call__(self):
        lengths = measured(self.data, self.llm, self.template) if self.data else assumed(self.rows, self.seed)
        text, image, part = lengths
        names = dict.fromkeys(part.tolist())
        summary = {
            n: dict(rows=int((part == n).sum()), **quantiles(text[part == n], self.max_length)) for n in names
        }
        summary["all"] = dict(rows=len(text), **quantiles(text, self.max_length))
        print("text tokens of a row, " + ("as in the file" if self.data else "ASSUMED, not measured"))
        for name, q in summary.items():
            print(f"  {name:24} " + "  ".join(f"{k} {v}" for k, v in q.items()))
        counted = []
        for tokens in tqdm(self.tokens, desc="tokens"):
            found = self.count(text + tokens * image)
            self.report(tokens, found)
            counted.append(dict(visual_tokens=tokens) | found)
        others = {} if self.data or not self.tokens else self.variants()
        timed = [self.time(v, np.minimum(text + v * image, self.max_length)) for v in self.timed]
        result = dict(
            lengths="measured" if self.data else "assumed",
            text_tokens=summary,
            counted=counted,
            counted_at_144_if=others,
            timed=timed,
        )
        names = ("batch_size", "max_length", "batches", "scale", "hidden", "layers")
        clock = "wall, bfloat16" if CUDA else "CPU time of the process, one thread, float32"
        path = write_record(
            self.record,
            [self.seed],
            result,
            rows=len(text),
            clock=clock,
            **{k: getattr(self, k) for k in names},
        )
        print(f"wrote {path}")


if __name__ == "__main__":
    tyro.cli(Packing)()
