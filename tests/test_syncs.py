"""Where the host would wait for a GPU: operators that read a number of the device.

They are counted on a CPU, where they are the same: `item()` and what calls it, the positions of a mask, and
indexing with a mask. Copies of whole tensors (`.cpu()`, `.tolist()`) cannot be seen on a CPU; the one of a
training step is counted by name. tests/test_gpu.py forbids every wait of a projector on a GPU."""

import traceback
from collections import Counter

import pytest
import torch
from references import SIZES, small_inputs, small_module
from tiny_stage import stage, write_parts
from torch.utils._python_dispatch import TorchDispatchMode

from delta_llava.train import train_run
from delta_llava.trainer import StageTrainer

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "bincount", "_unique2", "unique_dim"}


def mask_index(indices):
    return any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)


class Reads(TorchDispatchMode):
    "Counts operators that read from the device, by the last function of ours or of transformers'."

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        masked = name == "index" and mask_index(args[1])
        masked |= name in ("index_put", "index_put_") and mask_index(args[1]) and args[2].numel() > 1
        if name in READS or masked:
            self.found[self.where()] += 1
        return func(*args, **kwargs or {})

    @staticmethod
    def where():
        for frame in reversed(traceback.extract_stack()):
            for package in ("delta_llava", "transformers", "accelerate"):
                if f"/{package}/" in frame.filename:
                    return f"{package}: {frame.name}"
        return "elsewhere"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


def reads_per_step(kind, parts, folder, **options):
    "Of two more steps; what happens once cancels out."
    counts = {}
    for steps in (2, 4):
        settings = stage(kind, parts, folder / str(steps), max_steps=steps, logging_steps=100, **options)
        with Reads() as reads:
            train_run(settings, save_strategy="no")
        counts[steps] = reads.found
    counts[4].subtract(counts[2])
    return {where: n / 2 for where, n in counts[4].items() if n}


@pytest.fixture
def finite_reads(monkeypatch):
    "How many steps each reading of losses and gradient norms covers."
    covered, original = [], StageTrainer.check_finite

    def check_finite(self):
        covered.append(len(self._unread))
        original(self)

    monkeypatch.setattr(StageTrainer, "check_finite", check_finite)
    return covered


PADDED = {"delta_llava: supervised_loss": 1, "transformers: _ignore_causal_mask_sdpa": 2}


@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_step_of_padded_rows_waits_for_the_supervised_positions_and_transformers_mask(
    parts, tmp_path, finite_reads, kind
):
    "transformers looks for padding in the mask twice. Losses are read at the end."
    assert reads_per_step(kind, parts, tmp_path) == PADDED
    assert [n for n in finite_reads if n] == [2, 4]


@pytest.mark.parametrize("options", [dict(bf16=True, lora_rank=4), dict(train_budgets=(1, 4))], ids=str)
def test_no_option_reads_more(parts, tmp_path, options):
    found = reads_per_step("finetune", parts, tmp_path, **options)
    assert found.keys() <= PADDED.keys() and all(found[where] <= PADDED[where] for where in found)


def test_the_counter_finds_every_kind_of_read():
    x = torch.arange(4.0)
    with Reads() as reads:
        x.sum().item()
        bool((x > 1).any())
        x[x > 1]
        x.nonzero()
        x[x > 1] = x[x > 2].sum()  # one value needs no positions, but the mask on the right does
    assert reads.found["elsewhere"] == 5


SELECTING = {"prumerge"}  # the number of kept patches depends on the image


@pytest.mark.parametrize("name", sorted(SIZES.keys() - SELECTING))
def test_a_compressor_reads_nothing(name):
    config = SIZES[name].config
    module, inputs = small_module(name, config).train(), small_inputs(name, config)
    features = inputs.pop("features")
    with Reads() as reads:
        module(features, tokens=config.tokens, **inputs).sum().backward()
    assert not reads.found
