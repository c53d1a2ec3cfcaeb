"""Each backend against the dense reference: flash-attn's calls through a stand-in of the same signatures, CUDA's own on
CUDA, and who computes what."""

import itertools
import math
import sys
from types import ModuleType

import pytest
import torch
from test_attention import MASKS, run, tensors

from data_pipeline.errors import UsageError
from stpredict.attention import backends, flex, kernels, trial
from stpredict.attention.attention import attention
from stpredict.attention.backends import BACKENDS, Call, choose, refusal
from stpredict.attention.masks import BlockCausal, Causal, Full, Window, simplest
from stpredict.attention.rectangles import block_causal
from stpredict.attention.reference import dense_mask, reference_attention
from stpredict.priors.config import NextBlockConfig
from stpredict.priors.next_block import NextBlockPrior

BLOCK_CAUSAL = [mask for mask in MASKS if isinstance(mask, BlockCausal) and mask.length is None]


def exact(x):
    """In which flash-attn computes: fp32; here the tests of its algebra have fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _by_torch(q, k, causal, scale):
    """Scores ``(b, heads, n, m)`` of flash-attn's ``(b, n, heads, d)``; causal masks end at the last query and key."""
    assert q.stride(-1) == k.stride(-1) == 1
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bihd,bjhd->bhij", exact(q), exact(k)) * scale
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[1] - q.shape[1])
    return scores.masked_fill(hidden, -math.inf) if causal else scores


def _plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes):
    assert (dropout_p, window_size_left, window_size_right, softcap, alibi_slopes) == (0.0, -1, -1, 0.0, None)


# flash-attn 2.7's and 2.8's own signatures, in order (flash_attn/flash_attn_interface.py).
def _flash_attn_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    return_softmax,
):
    _plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    assert not return_softmax
    scores = _by_torch(q, k, causal, softmax_scale)
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2)
    out = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), exact(v))
    lse = scores.logsumexp(-1)
    return out.to(q.dtype), lse, torch.empty(0), torch.empty(2, dtype=torch.int64)


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    _plain(dropout_p, window_size_left, window_size_right, softcap, alibi_slopes)
    assert softmax_lse.is_contiguous()
    assert dout.shape == out.shape == q.shape == dq.shape
    assert dout.dtype == out.dtype == q.dtype == k.dtype == v.dtype == dq.dtype
    dout, q, k, v, out = (exact(x) for x in (dout, q, k, v, out))
    groups = q.shape[2] // k.shape[2]
    p = (_by_torch(q, k, causal, softmax_scale) - softmax_lse[..., None]).exp()
    of_p = torch.einsum("bihd,bjhd->bhij", dout, v.repeat_interleave(groups, 2))
    of_scores = p * (of_p - torch.einsum("bihd,bihd->bhi", dout, out)[..., None]) * softmax_scale
    dq.copy_(torch.einsum("bhij,bjhd->bihd", of_scores, k.repeat_interleave(groups, 2)))
    dk.copy_(torch.einsum("bhij,bihd->bjhd", of_scores, q).unflatten(2, (-1, groups)).sum(3))
    dv.copy_(torch.einsum("bhij,bihd->bjhd", p, dout).unflatten(2, (-1, groups)).sum(3))
    return torch.empty(0)


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    _plain(dropout_p, -1, -1, softcap, alibi_slopes)
    mask = Full()
    if causal:
        assert window_size[1] in (-1, 0)
        mask = Causal() if window_size[0] < 0 else Window(window_size[0] + 1)
    return reference_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask).transpose(1, 2)


def memory_efficient_attention(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
    """xformers', of ``(b, n, heads, d)`` with a key head for every head."""
    assert query.shape[2] == key.shape[2] == value.shape[2]
    inputs = (x.transpose(1, 2) for x in (query, key, value))
    return reference_attention(*inputs, attn_bias or Full()).transpose(1, 2)


def local_attention(window_left, window_right):
    assert window_right == 0
    return Window(window_left + 1)


@pytest.fixture
def stand_in(monkeypatch):
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    package.flash_attn_interface, package.flash_attn_func = interface, flash_attn_func
    interface._flash_attn_forward, interface._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    xformers, bias = ModuleType("xformers.ops"), ModuleType("xformers.ops.fmha.attn_bias")
    xformers.memory_efficient_attention = memory_efficient_attention
    bias.LowerTriangularFromBottomRightMask = Causal
    bias.LocalAttentionFromBottomRightMask = local_attention
    for name in ("xformers", "xformers.ops.fmha"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "xformers.ops", xformers)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", bias)
    monkeypatch.setattr(backends, "missing", lambda backend, device: None)


def compare(ours, reference, tolerance):
    for one, other in zip(ours, reference, strict=True):
        torch.testing.assert_close(one.to(other.dtype), other, **tolerance)


EXACT = {"rtol": 0, "atol": 1e-12}
ROUNDED = {"rtol": 2e-2, "atol": 3e-2}


class WithoutStaircases(kernels.TorchCpu):
    """PyTorch's kernel for CPUs, as if it took no mask: what CUDA's do."""

    chunk, staircases = 128, False


@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("mask", BLOCK_CAUSAL, ids=str)
@pytest.mark.parametrize("kernel", ["flash_attn", "without_staircases"])
@pytest.mark.usefixtures("stand_in")
def test_kernels_that_take_no_mask_give_the_reference(kernel, mask, key_heads, monkeypatch):
    monkeypatch.setitem(kernels.KERNELS, "without_staircases", WithoutStaircases())

    def ours(q, k, v, mask):
        out = block_causal(q, k, v, mask, kernel)
        return out if mask.prefix_lengths is None else out.masked_fill(~dense_mask(mask, 301).any(-1)[..., None], 0)

    inputs = tensors(key_heads=key_heads)
    compare(run(ours, *inputs, mask), run(reference_attention, *inputs, mask), EXACT)


@pytest.mark.parametrize("mask", [mask for mask in MASKS if isinstance(mask, BlockCausal)], ids=str)
@pytest.mark.usefixtures("stand_in")
def test_flash_in_half_precision_gives_the_reference(mask):
    inputs = tensors(key_heads=2, dtype=torch.bfloat16)
    ours = run(attention, *inputs, mask, backend="flash")
    compare(ours, run(reference_attention, *(x.double() for x in inputs), mask), ROUNDED)


@pytest.mark.parametrize("backend", ["flash", "xformers"])
@pytest.mark.parametrize("n", [1, 40, 301])
@pytest.mark.parametrize("mask", [Full(), Causal(), Window(1), Window(40), Window(1000)], ids=str)
@pytest.mark.usefixtures("stand_in")
def test_one_call_says_the_masks_that_have_one(backend, mask, n):
    inputs = tensors(key_heads=2, n=n, dtype=torch.bfloat16)
    ours = run(attention, *inputs, mask, backend=backend)
    compare(ours, run(reference_attention, *(x.double() for x in inputs), mask), ROUNDED)


@pytest.mark.parametrize("n", [1, 130, 301])
@pytest.mark.parametrize(
    "mask", [Window(2), Window(200), *(mask for mask in MASKS if getattr(mask, "length", None) is None)], ids=str
)
def test_flex_visits_the_tiles_that_somebody_sees(mask, n):
    mask = simplest(mask, n, 301)
    if isinstance(mask, Full):
        return
    seen = dense_mask(mask, n, 301)
    seen = seen[:, 0] if seen.ndim == 4 else seen[None]
    found = flex.block_mask(mask, n, 301, torch.device("cpu"))
    pad = (0, -301 % flex.TILE, 0, -n % flex.TILE)
    visited = found.to_dense()[0, 0].bool()
    wanted = torch.nn.functional.pad(seen, pad).unflatten(1, (-1, flex.TILE)).unflatten(3, (-1, flex.TILE))
    full, numbers = torch.zeros_like(visited), found.full_kv_num_blocks[0, 0]
    for row, number in enumerate(numbers.tolist()):
        full[row, found.full_kv_indices[0, 0, row, :number].long()] = True
    assert not (full & ~wanted.all(4).all(2).all(0)).any()
    some, every = (x.repeat_interleave(flex.TILE, 0).repeat_interleave(flex.TILE, 1)[:n, :301] for x in (visited, full))
    computed = found.mask_mod(torch.arange(2)[:, None, None], 0, torch.arange(n)[:, None], torch.arange(301))
    computed = every | (some & computed)
    real = seen.any(-1)  # the padding of a prefix sees some of itself, and its outputs are made 0
    assert torch.equal((computed & real[..., None]).expand(2, n, 301), seen.expand(2, n, 301))
    assert computed.any(-1).all()
    if mask == Causal() or (isinstance(mask, BlockCausal) and mask.prefix_lengths is None):
        assert torch.equal(visited, wanted.any(4).any(2).any(0))


def test_flex_compiles_a_shape_once_and_computes_on_a_cpu_what_the_reference_does():
    q, k, v, _ = tensors(key_heads=2, d=32, dtype=torch.float32)
    q.requires_grad_()
    torch.compiler.reset()
    for lengths, stance in (([70, 0], "default"), ([130, 3], "fail_on_recompile")):
        mask = BlockCausal(16, prefix=130, prefix_lengths=torch.tensor(lengths), length=290)
        with torch.no_grad(), torch.compiler.set_stance(stance):
            ours = attention(q, k, v, mask, backend="flex")
        torch.testing.assert_close(ours, reference_attention(q, k, v, mask), rtol=0, atol=1e-5)


@pytest.mark.parametrize("lengths", [None, torch.tensor([3, 0])], ids=["whole", "ragged"])
def test_flex_makes_a_block_mask_once_for_each_shape(lengths):
    def made(block=16, prefix=4, n=300, m=301, lengths=lengths, device="cpu"):
        return flex.block_mask(BlockCausal(block, prefix, lengths), n, m, torch.device(device))

    for other in ({"block": 8}, {"prefix": 5}, {"n": 299}, {"m": 302}, {"device": "meta"}):
        first = made()
        assert made() is first
        assert made(**other) is not first
    if lengths is not None:
        first = made()
        assert made(lengths=lengths.clone()) is not first


def call(device="cpu", dtype=torch.float32, head_width=64, queries=64, keys=64, mask=None, differentiates=True):
    return Call(device, dtype, head_width, queries, keys, mask or BlockCausal(16), differentiates)


def test_a_cpu_has_pytorchs_own_and_says_why_not_the_others():
    assert choose("auto", call()) == "sdpa"
    for backend, reason in {
        "flash": "it computes on CUDA only",
        "xformers": "it computes on CUDA only",
        "flex": "no backward pass on a CPU",
    }.items():
        with pytest.raises(UsageError, match=f"attention backend {backend}: .*{reason}; use auto"):
            choose(backend, call())
    assert choose("flex", call(differentiates=False)) == "flex"


def test_cuda_takes_the_first_that_can(monkeypatch):
    def best(**what):
        return choose("auto", call("cuda", **what))

    monkeypatch.setattr(backends, "missing", lambda backend, device: None)
    half = torch.bfloat16
    assert best(dtype=half) == "flex"
    assert best(dtype=half, mask=BlockCausal(256)) == "flash"
    assert (
        best(dtype=half, mask=Full()) == best(dtype=half, mask=Causal()) == best(dtype=half, mask=Window(9)) == "flash"
    )
    assert best() == best(mask=BlockCausal(256)) == "flex"
    assert best(mask=Full()) == best(dtype=half, head_width=12, mask=Causal()) == "sdpa"
    assert best(dtype=half, mask=BlockCausal(256), queries=9) == "flex"
    for step in (BlockCausal(16), Window(9)):  # of decoding: no two have the same shape
        assert best(mask=step, queries=9, differentiates=False) == "sdpa"
    assert best(dtype=half, mask=Window(9), queries=9, differentiates=False) == "flash"
    monkeypatch.setattr(backends, "missing", lambda backend, device: f"{backend} is not installed")
    assert best(dtype=half) == best(dtype=half, mask=Full()) == "sdpa"


REFUSED = [
    ("flash", {"dtype": torch.float32}, "fp16 and bf16, not float32"),
    ("flash", {"head_width": 264}, "multiples of 8 up to 256 wide, not 264"),
    ("flash", {"head_width": 60}, "multiples of 8 up to 256 wide, not 60"),
    ("flash", {"queries": 9}, "block-causal attention of 9 queries that are the last of 64"),
    ("flex", {"dtype": torch.float64}, "not compute in fp64"),
    ("flex", {"head_width": 8}, "at least 16 wide on CUDA, not 8"),
    ("xformers", {}, "no single call for block-causal attention"),
    ("xformers", {"mask": Causal(), "dtype": torch.float64}, "not compute in fp64"),
    ("xformers", {"mask": Causal(), "head_width": 60}, "multiples of 8 wide, not 60"),
    ("xformers", {"mask": Window(9), "dtype": torch.float32}, "windows in fp16 and bf16 alone"),
    ("xformers", {"mask": Window(9), "head_width": 264}, "up to 256 wide"),
]


@pytest.mark.parametrize(("backend", "what", "reason"), REFUSED)
def test_calls_beyond_a_kernel_are_refused_and_those_at_its_limits_are_not(backend, what, reason, monkeypatch):
    monkeypatch.setattr(backends, "missing", lambda backend, device: None)
    assert reason in refusal(backend, call("cuda", **{"dtype": torch.bfloat16, **what}))
    for width in (16, 256):
        for mask in (Full(), Causal(), Window(9)):
            assert refusal(backend, call("cuda", dtype=torch.bfloat16, head_width=width, queries=9, mask=mask)) is None
    assert refusal("flash", call("cuda", dtype=torch.float16, queries=64)) is None
    assert refusal("flex", call("cuda", head_width=300, queries=9)) is None
    assert refusal("xformers", call("cuda", head_width=512, mask=Causal())) is None


def test_old_and_broken_packages_are_no_backends(monkeypatch):
    monkeypatch.setattr(backends, "version", lambda name: {"flash-attn": "2.6.3", "xformers": "0.0.30"}[name])
    assert backends.missing.__wrapped__("flash", "cuda") == "flash-attn 2.6.3 is older than 2.7"
    assert backends.missing.__wrapped__("xformers", "cuda").startswith("xformers 0.0.30 cannot be imported: No module")
    assert backends.missing.__wrapped__("flex", "mps") == "FlexAttention knows no mps"
    monkeypatch.setattr(backends, "_no_package", lambda *package: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "not compute capability (7, 5)" in backends.missing.__wrapped__("flash", "cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert backends.missing.__wrapped__("flash", "cuda") is None


def test_a_small_call_tells_what_works_here(monkeypatch):
    assert trial.try_backend("sdpa") == "all masks"
    with pytest.raises(RuntimeError, match="CUDA only"):
        trial.try_backend("flash")
    for wrong in (lambda out: 1.2 * out, lambda out: out + (out - out.detach())):  # the latter's gradients alone
        monkeypatch.setattr(trial, "attention", lambda *call: wrong(attention(*call)))  # noqa: B023
        with pytest.raises(RuntimeError, match="differs from the dense reference"):
            trial.try_backend("sdpa")


@pytest.mark.parametrize("conditioning", [{"kind": "frames"}, {"kind": "text", "tokenizer": "t.json", "tokens": 2}])
def test_priors_ask_for_the_backend_of_their_config(conditioning):
    ids, told = torch.zeros(1, 32, dtype=torch.long), ()
    size = {"layers": 1, "width": 32, "heads": 2, "mlp_width": 32, "block": (1, 1, 4)}
    config = NextBlockConfig(**size, attention="flash", conditioning=conditioning)
    if config.prefix:
        told = torch.zeros(1, 2, dtype=torch.long), torch.tensor([1])
    with pytest.raises(UsageError, match="attention backend flash: it computes on CUDA only"):
        NextBlockPrior(config, 10, (2, 4, 4))(ids, *told)


CUDA_MASKS = [*MASKS, BlockCausal(16), BlockCausal(128), BlockCausal(1, prefix=20)]
QUICKLY = (Window(40), BlockCausal(16), BlockCausal(16, prefix=130), CUDA_MASKS[14])


def cuda_cases():
    """Every one; but flex takes seconds to compile each, so that most of its are slow ones."""
    for backend in ("auto", *BACKENDS):
        for mask in CUDA_MASKS:
            for n, key_heads, dtype in itertools.product((301, 40), (4, 2), (torch.bfloat16, torch.float32)):
                compiles = backend in ("auto", "flex")
                slow = compiles and (mask not in QUICKLY or n == 40 or (key_heads == 2) == (dtype == torch.bfloat16))
                yield pytest.param(backend, mask, n, key_heads, dtype, marks=pytest.mark.slow if slow else ())


@pytest.mark.gpu
@pytest.mark.parametrize(("backend", "mask", "n", "key_heads", "dtype"), list(cuda_cases()), ids=str)
def test_on_cuda_every_backend_gives_the_reference(backend, mask, n, key_heads, dtype):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.compiler.reset()  # more shapes than one process may compile
    inputs = [x.cuda() for x in tensors(key_heads=key_heads, n=n, d=64, dtype=dtype)]
    try:
        ours = run(attention, *inputs, mask, backend=backend)
    except UsageError as reason:
        pytest.skip(str(reason))
    compare(
        ours,
        run(reference_attention, *(x.double() for x in inputs), mask),
        ROUNDED if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 5e-3},
    )
