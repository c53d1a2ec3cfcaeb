"""What tokenizing clips in every step is said to take, against a tokenizer that does it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_pipeline.config import ClipConfig
from stpredict.estimates.duration import Utilization
from stpredict.estimates.gpus import find_gpu
from stpredict.estimates.live_bytes import LiveBytes
from stpredict.estimates.machine import Machine
from stpredict.estimates.memory import MemoryEstimator
from stpredict.estimates.planned import Planned, plan_training
from stpredict.estimates.tokenizing import plan_tokenizing
from stpredict.estimates.ways import Ways
from stpredict.jobs.config import PriorJobConfig
from stpredict.tokenizers.causal_cnn import CausalCnnTokenizer
from stpredict.tokenizers.clips import clip_tokens
from stpredict.tokenizers.config import CausalCnnConfig
from tests.stpredict.estimates.planned import SMALL_PRIOR, SMALL_TOKENIZER

MODEL, CLIP = CausalCnnConfig(**SMALL_TOKENIZER, levels=(8, 8)), ClipConfig(frames=9, size=(32, 32))


def planned(tokenizer: bool, together: int = 4) -> Planned:
    config = PriorJobConfig(
        run="(none)",
        tokenizer="(none)",
        data={"kind": "clips", "shards": "(none)", "batch_size": together},
        latent={"grid": MODEL.grid(9, 32, 32), "codebook_size": MODEL.codebook_size},
        model=SMALL_PRIOR,
        training={"steps": 10, "batch_size": 8, "precision": "fp32", "zero_stage": 0},
    )
    return plan_training(config, (MODEL, CLIP) if tokenizer else None)


def test_flops_and_bytes_are_those_of_a_tokenizer_that_runs():
    tokenizer = CausalCnnTokenizer(MODEL).eval()
    clips = torch.zeros(2, 9, 32, 32, 3, dtype=torch.uint8)
    live, counter = LiveBytes(), FlopCounterMode(display=False)
    live.ignore((*tokenizer.parameters(), *tokenizer.buffers(), clips))
    with live:
        clip_tokens(tokenizer, clips, 2)
    with counter:
        clip_tokens(tokenizer, clips, 2)
    found = plan_tokenizing(MODEL, CLIP, together=2)
    assert found.forward == pytest.approx(live.peak, rel=0.01)
    assert found.flops == counter.get_total_flops() / 2
    assert found.weights == sum(t.nbytes for t in (*tokenizer.parameters(), *tokenizer.buffers()))
    assert found.clip == clips.nbytes / 2


def test_the_last_clips_of_a_micro_batch_are_filled_up():
    found = plan_tokenizing(MODEL, CLIP, together=4)
    assert [found.flops_of(size) / found.flops for size in (1, 4, 5, 8)] == [4, 4, 8, 8]


def test_a_step_waits_for_each_ranks_tokens():
    one = planned(True)
    training = one.config.training.model_copy(update={"micro_batch_size": 1})
    machine = Machine(find_gpu("a100-80g"), 1, 2, 25)
    ways = (Ways(p, 1e12, Utilization(0.5), with_memory=False) for p in (planned(False), one))
    cached, clips = (of.way(machine, training).time for of in ways)
    # Four micro-batches of one clip, each filled up to four; in TF32, 156 TFLOP/s.
    assert clips.tokenizing_s == pytest.approx(4 * 4 * one.tokenizing.flops / (0.5 * 156e12))
    assert clips.step_s - cached.step_s == pytest.approx(clips.tokenizing_s)
    assert clips.without_overlap_s - cached.without_overlap_s == pytest.approx(clips.tokenizing_s)


def test_memory_has_the_tokenizer_the_clips_and_what_it_makes_of_them():
    alone, together = planned(False), {n: planned(True, together=n) for n in (4, 256)}
    without, few, many = (MemoryEstimator(p).of(p.config.training, 1, 4) for p in (alone, *together.values()))
    tokenizing = together[256].tokenizing
    held = tokenizing.weights + 8 * tokenizing.clip  # of both micro-batches
    assert (few.moment, few.tokenizer, few.total) == ("backward", held, without.total + held)
    # So many at once that this is the most; gradients of the micro-batch before are there then, activations are not.
    assert (many.moment, many.tokenizer) == ("tokenizing", held + tokenizing.forward)
    parameters = sum(p.numel() for p in alone.task.model.parameters())
    assert (many.gradients, many.activations) == (4 * parameters, 0)
