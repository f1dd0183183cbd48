"""Survivors read from torch's tensors are those of NumPy's, bit for bit, whatever holds them."""

from __future__ import annotations

import numpy as np
import pytest

from dare_agg.codec.mask import parse_drop_rate
from dare_agg.codec.update import UpdateSpec, encode_update
from dare_agg.errors import LayoutError, NonFiniteError
from dare_agg.rounds.client import make_client_update
from dare_agg.rounds.plan import make_plans
from dare_agg.rounds.terms import UpdateTerms
from dare_agg.vectors.model import global_model

torch = pytest.importorskip("torch")

from dare_agg.torch.delta import TrainedDelta  # noqa: E402
from dare_agg.torch.loading import as_source, load_into  # noqa: E402
from dare_agg.torch.named import matched_tensors, named_tensors  # noqa: E402
from dare_agg.torch.places import held  # noqa: E402

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here"),
        ],
    ),
]
SHAPES = {"embed": (301, 40), "layer.weight": (64, 33), "layer.bias": (64,), "scale": ()}


def a_version(seed: int = 0):
    generator = np.random.default_rng(seed)
    arrays = {n: generator.normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    return global_model(arrays, by_form=True)


def spec_of(version, drop_rate="0.9", values="f32", mask="stratified"):
    ref = version.ref
    rate = parse_drop_rate(drop_rate)
    key = bytes(range(16))
    return UpdateSpec(ref.size, rate, mask, key, key, 3, values, ref.base, ref.layout)


def trained(version, dtype, device="cpu", contiguous=True):
    """Tensors that hold the version and were trained, their parts, and what was loaded."""
    tensors = {
        name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in SHAPES.items()
    }
    if not contiguous:
        tensors = {n: t.t().contiguous().t() if t.ndim == 2 else t for n, t in tensors.items()}
    parts = {name: held(tensor) for name, tensor in tensors.items()}
    start = load_into(version, parts)
    begun = version.groups.layout.flatten(
        {n: t.float().cpu().numpy() for n, t in tensors.items()}
    ).copy()
    noise = torch.Generator().manual_seed(5)
    for tensor in tensors.values():
        tensor += (0.01 * torch.randn(tensor.shape, generator=noise)).to(device, dtype)
    after = version.groups.layout.flatten({n: t.float().cpu().numpy() for n, t in tensors.items()})
    return TrainedDelta(version.groups.layout, parts, as_source(start.delta)), begun, after


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("mask", "values"), [("stratified", "b1"), ("bernoulli", "f32")])
def test_an_update_has_the_bits_that_numpy_gives_it(dtype, mask, values, contiguous, device):
    version = a_version()
    delta, begun, after = trained(version, dtype, device, contiguous)
    spec = spec_of(version, values=values, mask=mask)
    assert encode_update(spec, delta) == encode_update(spec, (begun, after))


def test_reading_takes_what_taking_takes():
    version = a_version()
    delta, begun, after = trained(version, torch.bfloat16)
    out = np.empty(5000, np.float32)
    delta.read(9000, 14000, out)
    assert (out == (after - begun)[9000:14000]).all()


def test_a_loaded_tensor_holds_the_version_rounded_to_nearest_even():
    version = a_version()
    tensors = {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in SHAPES.items()}
    load_into(version, {name: held(tensor) for name, tensor in tensors.items()})
    for name, array in version.arrays().items():
        right = torch.from_numpy(np.array(array)).bfloat16()
        assert torch.equal(tensors[name], right)


@pytest.mark.parametrize("device", DEVICES)
def test_measures_are_those_of_the_arrays(device):
    version = a_version()
    delta, begun, after = trained(version, torch.float32, device)
    change = np.abs(after - begun)
    found = delta.measure()
    assert found.norm == pytest.approx(float(np.linalg.norm(change.astype(np.float64))), rel=1e-7)
    assert found.largest == change.max()
    assert found.above == np.count_nonzero(change > np.float32(0.005))


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_on_several_devices_is_one_vector(device):
    version = a_version()
    delta, begun, after = trained(version, torch.bfloat16)
    parts = {n: held(p.local.to(device if n == "embed" else "cpu")) for n, p in delta.parts.items()}
    spec = spec_of(version, "0.5")
    spread = TrainedDelta(delta.layout, parts, delta.start)
    assert encode_update(spec, spread) == encode_update(spec, (begun, after))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
def test_the_host_gets_survivors_and_nothing_else():
    from torch.profiler import ProfilerActivity, profile

    size = 4_000_000
    arrays = {"w": np.zeros((size // 1000, 1000), np.float32)}
    version = global_model(arrays, by_form=True)
    part = held(torch.ones(arrays["w"].shape, device="cuda"))
    delta = TrainedDelta(version.groups.layout, {"w": part}, as_source(version.delta))
    spec = spec_of(version, "0.99")
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as watched:
        encode_update(spec, delta)
        torch.cuda.synchronize()
    down = [e for e in watched.events() if "DtoH" in e.name]
    # 40,000 survivors are one group: one copy down, and what measuring would take is not there.
    assert 1 <= len(down) <= 2


@pytest.mark.parametrize("device", DEVICES)
def test_a_nan_is_named_by_its_place(device):
    version = a_version()
    delta, _, _ = trained(version, torch.float32, device)
    delta.parts["layer.weight"].local[3, 5] = float("nan")
    with pytest.raises(NonFiniteError, match=r"nan in tensor 'layer.weight' at index \(3, 5\)"):
        delta.measure()


def test_what_the_model_lacks_counts_as_unchanged():
    version = a_version()
    delta, begun, after = trained(version, torch.float32)
    parts = {name: part for name, part in delta.parts.items() if name != "embed"}
    entry = version.groups.layout["embed"]
    after[entry.offset : entry.stop] = begun[entry.offset : entry.stop]
    spec = spec_of(version, "0.5")
    less = TrainedDelta(delta.layout, parts, delta.start)
    assert encode_update(spec, less) == encode_update(spec, (begun, after))


@pytest.mark.parametrize(
    ("dtype", "device", "said"),
    [
        (torch.float8_e4m3fn, "cpu", "cannot hold a version's values"),
        (torch.int8, "cpu", "cannot hold a version's values"),
        (torch.float32, "meta", "on the device meta"),
    ],
)
def test_what_cannot_hold_a_version_is_refused_before_anything_changes(dtype, device, said):
    version = a_version()
    tensors = {n: torch.zeros(s) for n, s in SHAPES.items()}
    tensors["scale"] = torch.zeros((), dtype=dtype, device=device)
    with pytest.raises(LayoutError, match=said):
        load_into(version, {name: held(tensor) for name, tensor in tensors.items()})
    assert not tensors["embed"].any()


def test_a_version_beyond_float16_is_refused():
    version = a_version()
    version.delta[-1] = 1e6
    tensors = {n: torch.zeros(s, dtype=torch.float16) for n, s in SHAPES.items()}
    with pytest.raises(NonFiniteError, match="does not fit float16"):
        load_into(version, {name: held(tensor) for name, tensor in tensors.items()})


# --- the names of models --------------------------------------------------------------------


def tiny_llama(**config):
    transformers = pytest.importorskip("transformers")
    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**shape, **config}))


def arrays_of(model):
    return {n: t.detach().float().numpy().copy() for n, t in named_tensors(model).items()}


@pytest.mark.parametrize("wrap", [torch.nn.DataParallel, torch.compile])
def test_wrappers_are_seen_through(wrap):
    model = tiny_llama()
    assert named_tensors(wrap(model)).keys() == named_tensors(model).keys()


def test_a_tied_head_is_one_tensor_by_either_name():
    model = tiny_llama(tie_word_embeddings=True)
    arrays = arrays_of(model)
    both = global_model(arrays, by_form=True)
    assert both.groups.copies
    one = global_model({n: a for n, a in arrays.items() if n != "lm_head.weight"}, by_form=True)
    for version in (both, one):
        found = matched_tensors(version.groups, named_tensors(model))
        assert set(version.groups.layout.names) <= set(found)
        version.delta[:] += 1
        load_into(version, {name: held(tensor) for name, tensor in found.items()})
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert np.array_equal(
            arrays_of(model)["model.embed_tokens.weight"], arrays["model.embed_tokens.weight"] + 1
        )
        version.delta[:] -= 1


def test_a_head_that_is_tied_no_more_gets_the_version_too():
    tied = global_model(arrays_of(tiny_llama(tie_word_embeddings=True)), by_form=True)
    apart = tiny_llama(tie_word_embeddings=False)
    found = matched_tensors(tied.groups, named_tensors(apart))
    load_into(tied, {name: held(tensor) for name, tensor in found.items()})
    assert torch.equal(apart.lm_head.weight, apart.model.embed_tokens.weight)


def test_of_a_peft_model_the_adapter_alone_is_federated_as_peft_names_it(tmp_path):
    peft = pytest.importorskip("peft")
    from safetensors.numpy import load_file

    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert named_tensors(model).keys() == saved.keys()
    version = global_model(saved, by_form=True)
    frozen = model.base_model.model.model.embed_tokens.weight.clone()
    version.delta[:] += 1
    found = matched_tensors(version.groups, named_tensors(model))
    load_into(version, {name: held(tensor) for name, tensor in found.items()})
    assert torch.equal(frozen, model.base_model.model.model.embed_tokens.weight)
    for name, array in arrays_of(model).items():
        assert np.array_equal(array, saved[name] + 1)


def test_another_model_is_refused_by_its_first_stranger():
    version = a_version()
    with pytest.raises(LayoutError, match="the global model does not have"):
        matched_tensors(version.groups, named_tensors(tiny_llama()))
    with pytest.raises(
        LayoutError, match=r"has shape \(64, 2\), the global model's has \(64, 33\)"
    ):
        matched_tensors(version.groups, {"layer.weight": torch.nn.Parameter(torch.zeros(64, 2))})


def test_a_trained_model_gives_the_update_of_its_arrays():
    model = tiny_llama(tie_word_embeddings=True)
    base = arrays_of(model)
    version = global_model(base, by_form=True)
    plan = make_plans(bytes(16), 1, [None], UpdateTerms(), version.ref)[0]
    parts = {n: held(t) for n, t in matched_tensors(version.groups, named_tensors(model)).items()}
    start = load_into(version, parts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    tokens = torch.arange(32).reshape(2, 16)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    right = make_client_update(plan, base, arrays_of(model), by_form=True)
    delta = TrainedDelta(version.groups.layout, parts, as_source(start.delta))
    assert encode_update(plan.spec(), delta) == right.blob
    assert delta.measure().norm == pytest.approx(right.delta_norm, rel=1e-12)
