"""Packing against padding, on the lengths of a mix like LLaVA's 665k: tokens that are computed, counted; and time of a training pass, measured.

    python benchmarks/packing.py                                              # assumed lengths; writes runs/packing.json
    python benchmarks/packing.py --data llava_v1_5_mix665k.json --llm hub:lmsys/vicuna-7b-v1.5   # the real ones

Without the real file the lengths are drawn from `PARTS`: what the mix consists of is published, how long its rows are is assumed. Because the result hangs on
that, tokens are counted for other assumptions, too.

Tokens: every batch of the epoch, as the model gets it from `Collator`: rows × longest row, padding included; packed, as many sequences of one length up to `max_length` as hold the rows with the least padding. Time: forward and backward of a small random Llama on
the same rows, padded and packed one after the other, in an order that alternates; both losses are compared first. All lengths are divided by `scale`, since the model is
narrow, too: with width 256 and scale 8 attention takes 1/6 of the work of the longest row (in a 7B LLM 1/12). On a CPU the time is that of the process on one
thread, in which other work on the machine takes part only through caches and clock rates.
"""
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time
from types import SimpleNamespace

import numpy as np
import torch
import tyro
from tqdm.auto import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.trainer_pt_utils import LengthGroupedSampler

from delta_llava.assets import resolve
from delta_llava.collator import Collator, pack_rows
from delta_llava.conversations import check_turns, read_rows, training_turns
from delta_llava.processor import as_messages, build_processor
from delta_llava.runs import write_record
from delta_llava.vlm import supervised_loss

ROWS, TEXT_ONLY = 665_298, 40_688
PROMPT = 42  # Tokens that every row has: the template's first words, roles, line breaks
TEXT = "text alone: ShareGPT"
PARTS = {  # Published: thousands of rows (LLaVA-1.5, table of its data). Assumed: median of the text's tokens without PROMPT, and σ of their logarithm
    "LLaVA conversations": (58, 250, .35),  # several questions, answers of a sentence or two
    "LLaVA descriptions": (23, 130, .25),  # one answer of some hundred words
    "LLaVA reasoning": (77, 180, .3),  # the same, with a longer question
    "VQAv2, merged": (83, 110, .5),  # all questions about a picture in one row, some five of them, answers of a word
    "GQA, merged": (72, 250, .6),  # the same, a dozen of them
    "OKVQA, A-OKVQA": (9 + 66, 60, .3),  # one question, with choices or a word on the form of the answer
    "OCRVQA": (80, 120, .4),  # some five questions about a book's cover
    "TextCaps": (22, 80, .5),  # words read in the picture, and one sentence
    "RefCOCO": (48, 300, .6),  # up to ten boxes, each of four numbers
    "Visual Genome regions": (86, 500, .3),  # ten boxes
}


def assumed(rows, seed, text=(1100, 1.), spread=1.):
    "Text tokens of each row, whether it has a picture, and the part it is of; all spreads can be made narrower or wider."
    rng, share = np.random.default_rng(seed), np.array([n for n, _, _ in PARTS.values()], float)
    parts = [(TEXT, TEXT_ONLY/ROWS, *text)] + [(name, (1 - TEXT_ONLY/ROWS)*p, m, s) for (name, (_, m, s)), p in zip(PARTS.items(), share/share.sum())]
    part = rng.choice(len(parts), rows, p=[p for _, p, _, _ in parts])
    median, sigma = np.array([(m, s*median_and_quartiles) for *_, m, s in parts])[part].T
    return PROMPT + np.exp(np.log(median) + sigma*rng.standard_normal(rows)).astype(int), part > 0, np.array([name for name, *_ in parts])[part]


def real(file, llm, template):
    "The same of a file; its rows are of two parts, with a picture and without."
    processor = build_processor(CLIPImageProcessorPil(), AutoTokenizer.from_pretrained(resolve(llm).path), tokens=1, template=template)
    lengths, images = [], []
    for n, (row, _) in enumerate(tqdm(read_rows(file), desc="lengths", unit=" rows")):
        try: marks, _ = check_turns(row.get("conversations"))
        except ValueError as e: raise ValueError(f"row {n} of {file}: {e}") from e
        lengths.append(len(processor.tokenizer(processor.apply_chat_template(as_messages(training_turns(row["conversations"])))).input_ids) - marks)
        images.append(marks > 0)
    images = np.array(images)
    return np.array(lengths), images, np.where(images, "with a picture", "text alone")


def in_batches(lengths, size, grouped, seed) -> Iterator[list[int]]:
    "Row numbers of each batch, shuffled as `Trainer` does it; the last batch may be short."
    torch.manual_seed(seed)
    order = list(LengthGroupedSampler(size, lengths=lengths)) if grouped else torch.randperm(len(lengths)).tolist()
    return (order[i:i + size] for i in range(0, len(order), size))


def count(lengths, size, seed, max_length):
    "Tokens of an epoch in each way to make batches: sequences × their length, summed over the batches."
    lengths, found = lengths.tolist(), dict(rows=int(lengths.sum()))
    for grouped in (False, True):
        padded = packed = 0
        for batch in in_batches(lengths, size, grouped, seed):
            one = [lengths[i] for i in batch]
            shared = pack_rows(one, max_length)
            padded += len(one)*max(one)
            packed += len(shared)*max(sum(one[i] for i in s) for s in shared)
        found |= {"grouped" if grouped else "padded": padded, "grouped, packed" if grouped else "packed": packed}
    ways = [k for k in found if k != "rows"]
    return dict(tokens=found, padding={k: round(1 - found["rows"]/found[k], 4) for k in ways}, times_fewer={k: round(found["padded"]/found[k], 3) for k in ways})


class Lengths(ProcessorMixin):
    "A processor whose conversations are numbers: so many tokens."
    questions, placeholders, tokenizer = False, None, SimpleNamespace(pad_token_id=0)
    def __init__(self): pass
    def encode_conversation(self, n, **_):
        ids = [1 + i % 500 for i in range(n)]
        return dict(input_ids=ids, labels=[-100, *ids[1:]])  # a row's first word is never an answer


def collators(max_length):
    "Ours, on rows that are lengths."
    return {way: Collator(processor=Lengths(), max_length=max_length, packing=way == "packed") for way in ("padded", "packed")}


def one_pass(llm, batch):
    "Seconds of a forward and a backward pass, and the loss."
    cuda = llm.device.type == "cuda"
    batch = {k: v.to(llm.device) for k, v in batch.items()}
    clock = perf_counter if cuda else process_time
    if cuda: torch.cuda.synchronize()
    start, labels = clock(), batch.pop("labels")
    loss = supervised_loss(llm.model(**batch, use_cache=False).last_hidden_state, labels, llm.lm_head, llm.loss_function, vocab_size=llm.vocab_size)
    loss.backward()
    if cuda: torch.cuda.synchronize()
    seconds = clock() - start
    llm.zero_grad()
    return seconds, loss.item()


def median_and_quartiles(padded, packed, seed):
    "Ratio of the sums over all batches, its 90 % interval from drawing the batches again, and the ratios of single batches."
    padded, packed, rng = np.array(padded), np.array(packed), np.random.default_rng(seed)
    draws = rng.integers(len(padded), size=(4000, len(padded)))
    low, high = np.quantile(padded[draws].sum(1)/packed[draws].sum(1), (.05, .95))
    return dict(ratio=round(padded.sum()/packed.sum(), 3), interval=[round(low, 3), round(high, 3)], batches=[round(r, 3) for r in np.sort(padded/packed)])


@dataclass
class Packing:
    data: Path | None = None  # A file of conversations; without it the lengths are assumed
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

    def __call__(self):
        if min(self.rows, self.batches, self.scale) < 1 or self.batch_size < 2: raise ValueError(f"rows={self.rows}, batches={self.batches}, scale={self.scale} must be at least 1, batch_size={self.batch_size} 2.")
        text, image, part = real(self.data, self.llm, self.template) if self.data else assumed(self.rows, self.seed)
        full = lambda v: np.minimum(text + v*image, self.max_length)
        quantiles = {name: dict(rows=int((part == name).sum()), **self.quantiles(np.minimum(text, self.max_length)[part == name])) for name in dict.fromkeys(part.tolist())}
        quantiles["all"] = dict(rows=len(text), **self.quantiles(np.minimum(text, self.max_length)))
        print("text tokens of a row, " + ("as in the file" if self.data else "ASSUMED, not measured"))
        for name, q in quantiles.items(): print(f"  {name:24} " + "  ".join(f"{k} {v}" for k, v in q.items()))
        counted = []
        for v in tqdm(self.tokens, desc="tokens"): counted.append(dict(visual_tokens=v) | self.say(v, count(full(v), self.batch_size, self.seed, self.max_length)))
        others = {} if self.data else {name: count(np.minimum(t + 144*p, self.max_length), self.batch_size, self.seed, self.max_length) for name, (t, p, _) in tqdm(self.variants().items(), desc="other assumptions")}
        for name, c in others.items(): self.say(f"144, {name}", c)
        timed = [self.time(v, full(v)) for v in self.timed]
        about = dict(lengths="measured" if self.data else "assumed", text_tokens=quantiles, counted=counted, counted_at_144_if=others, timed=timed)
        settings = {k: getattr(self, k) for k in ("batch_size", "max_length", "batches", "scale", "hidden", "layers")}
        clock = "wall, bfloat16" if torch.cuda.is_available() else "CPU time of the process, one thread, float32"
        print(f"wrote {write_record(self.record, [self.seed], about, rows=len(text), clock=clock, **settings)}")

    def quantiles(self, lengths):
        return {f"{q}%": int(np.quantile(lengths, q/100)) for q in (5, 25, 50, 75, 95)} | dict(mean=round(float(lengths.mean()), 1), at_max_length=round(float((lengths == self.max_length).mean()), 3))

    def variants(self):
        "Other assumptions than those of `PARTS`."
        draw = lambda **how: assumed(self.rows//8, self.seed, **how)
        return {"all lengths half as spread": draw(spread=.5), "all lengths 1.5 times as spread": draw(spread=1.5), "text alone half as long": draw(text=(550, 1.)), "text alone as short as the rest": draw(text=(200, .5))}

    def say(self, v, found):
        tqdm.write(f"V={v}: " + ", ".join(f"{k}: {found['padding'][k]:.0%} padding, {found['times_fewer'][k]:.2f}×" for k in found["padding"]))
        return found

    def time(self, v, lengths):
        "Padded and packed passes over the same batches."
        torch.manual_seed(self.seed)
        cuda, threads = torch.cuda.is_available(), torch.get_num_threads()
        torch.set_num_threads(1)
        llm = LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=self.hidden, intermediate_size=round(2.6875*self.hidden), num_hidden_layers=self.layers, num_attention_heads=self.hidden//64 or 1))
        llm.to("cuda" if cuda else "cpu", torch.bfloat16 if cuda else torch.float32)
        collate, seconds, tokens = collators(self.max_length//self.scale), dict(padded=[], packing=[]), dict(padded=0, packing=0)
        chosen = [b for _, b in zip(range(self.batches + 1), in_batches(lengths.tolist(), self.batch_size, False, self.seed + 1))]
        for n, numbers in enumerate(tqdm(chosen, desc=f"time at V={v}")):  # the first one warms up
            made = {way: c([dict(id=int(i), image=None, conversations=max(2, round(lengths[i]/self.scale))) for i in numbers]) for way, c in collate.items()}
            done = {way: one_pass(llm, made[way]) for way in (("padded", "packed") if n % 2 else ("packed", "padded"))}
            torch.testing.assert_close(done["packed"][1], done["padded"][1], rtol=1e-2 if cuda else 1e-4, atol=0, msg=lambda m: f"packed rows give another loss: {m}")
            for way in seconds if n else ():
                seconds[way].append(done[way][0])
                tokens[way] += made[way]["input_ids"].numel()
        torch.set_num_threads(threads)
        found = dict(visual_tokens=v, seconds={k: round(sum(s), 2) for k, s in seconds.items()}, token_ratio=round(tokens["padded"]/tokens["packed"], 3), **median_and_quartiles(**seconds, seed=self.seed))
        tqdm.write(f"V={v}: packed passes are {found['ratio']:.2f}× as fast as padded ones [90 %: {found['interval'][0]:.2f}–{found['interval'][1]:.2f}], with {found['token_ratio']:.2f}× fewer tokens")
        return found


if __name__ == "__main__": tyro.cli(Packing)()
