"""Launcher, HMM and planner say the same of what fits, whatever the model, the budget and the number of devices."""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
from hypothesis import assume, given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from elasticmoe.cli import checks, settings, up
from elasticmoe.common.capacity import MemoryForecast, budgets_of, load_of, needs_of, size_load, sizes_of
from elasticmoe.common.config import HmmConfig
from elasticmoe.common.devices.driver import MemoryInfo
from elasticmoe.common.families import load_spec, records
from elasticmoe.common.layout import Layout, initial_layout, keys_on
from elasticmoe.common.model_spec import ModelSpec, round_up
from elasticmoe.common.protocol.errors import DoesNotFit
from elasticmoe.common.protocol.hmm import LoadModel, StageLayout
from elasticmoe.common.protocol.ids import TransitionId
from elasticmoe.services.hmm.memory.catalog import Catalog, DeviceEntry, Loaded, Span
from elasticmoe.services.hmm.transition.staging import check_stage
from elasticmoe.services.scaler.planning.plan import Leg, Plan, Rates, Target
from elasticmoe.services.scaler.planning.planner import plan_way

PAGE = 4096
DEVICES = tuple(f"host:{i}" for i in range(5))
MODELS = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 3),
        "hidden_size": st.sampled_from([32, 64, 96]),
        "intermediate_size": st.sampled_from([32, 64, 160]),
        "num_local_experts": st.integers(1, 9),
        "vocab_size": st.sampled_from([64, 1000]),
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


def settings_for(folder: Path, model: dict[str, int], budget: int, num_used: int, exchange: str) -> settings.Settings:
    """Of `up` for that model. Writes its config.json, which is all that sizes come from."""
    fixed = {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(fixed | model))
    parser = argparse.ArgumentParser()
    up.add_arguments(parser)
    flags = ["--model", str(folder), "--run-dir", str(folder / "run"), "--device-memory", f"{budget}B"]
    more = ["--replicas", str(num_used), "--devices", f"host:{len(DEVICES)}", "--max-model-len", "512"]
    more += ["--exchange", exchange]
    return settings.from_flags(parser.parse_args([*flags, *more]))


def test_a_budget_is_a_share_of_what_the_driver_says_or_of_the_machine_or_what_is_given() -> None:
    def budgets(devices: str, given: int = 0, **told: int) -> list[int]:
        config = HmmConfig(run_dir="/r", devices=devices, device_bytes=given)
        memory = {f"cuda:{name[1:]}": MemoryInfo(1, total) for name, total in told.items()}
        return [nbytes / (1 << 20) for nbytes in budgets_of(config, 100 << 20, memory).values()]

    assert budgets("host:4") == [20, 20, 20, 20]
    assert budgets("cuda:0,cuda:2", _0=1 << 30, _2=10 << 20) == [818, 8]  # whole pages of 2 MiB, whatever is free
    assert budgets("cuda:0,cuda:2", 5 << 20, _0=1 << 30, _2=10 << 20) == [4, 4]
    assert budgets("cuda:0", _0=2 << 20) == [0]


def test_devices_that_one_is_divided_into_have_budgets_of_its_memory_or_what_is_given() -> None:
    memory = {name: MemoryInfo(1, 1 << 30) for name in ("cuda:0.0", "cuda:0.1", "cuda:0.2", "cuda:1")}

    def budgets(given: int) -> dict[str, int]:
        config = HmmConfig(run_dir="/r", devices="cuda:0/3,cuda:1", device_bytes=given)
        return {name: nbytes >> 20 for name, nbytes in budgets_of(config, 0, memory).items()}

    assert budgets(0) == {"cuda:0.0": 272, "cuda:1": 818, "cuda:0.1": 272, "cuda:0.2": 272}
    assert set(budgets(8 << 20).values()) == {8}


def up_says_yes(given: settings.Settings, folder: Path) -> bool:
    try:
        checks.check_memory(given, folder)
    except DoesNotFit:
        return False
    return True


def load_says_yes(load: LoadModel, spec: ModelSpec, budget: int) -> bool:
    """The HMM, before it creates anything."""
    try:
        size_load(load, spec, dict.fromkeys(DEVICES, budget), PAGE)
    except DoesNotFit:
        return False
    return True


def bytes_needed(spec: ModelSpec, load: LoadModel, *layouts: Layout) -> int:
    """Of the fullest device with the records of all `layouts`, a ledger and the least KV: by hand."""
    needs = needs_of(load, spec, size_load(load, spec, dict.fromkeys(DEVICES, 1 << 40), PAGE).kv, PAGE)
    sizes = {record.key: round_up(record.nbytes, PAGE) for record in records(spec)}
    held: dict[str, set[object]] = {}
    for layout in layouts:
        for seat in layout.seats:
            held.setdefault(seat.device, set()).update(keys_on(layout, seat.slot))
    most = max(sum(sizes[key] for key in keys) for keys in held.values())
    mailbox = load.max_tokens * (1 + spec.moe.top_k) * spec.hidden * 4 if load.exchange == "mailbox" else 0
    return most + needs.ledger + round_up(mailbox, PAGE) + needs.kv_handles_min * needs.kv_handle_bytes


def loaded_at(load: LoadModel, spec: ModelSpec, budget: int) -> tuple[Catalog, Loaded, MemoryForecast]:
    """The HMM after that load, and what its status tells the scaler."""
    found = size_load(load, spec, dict.fromkeys(DEVICES, budget), PAGE)
    loaded = Loaded(load, spec, found.kv, PAGE, load.layout, "memory", found.footprint, found.kv_handles, "")
    needs = needs_of(load, spec, found.kv, PAGE)
    kv = {name: device.num_kv_handles for name, device in found.devices.items()}
    entries = tuple(DeviceEntry(name, budget, kv=(Span(0, PAGE),) * kv.get(name, 0)) for name in DEVICES)
    forecast = MemoryForecast(
        dict.fromkeys(DEVICES, budget),
        found.footprint,
        needs.ledger,
        needs.kv_handle_bytes,
        needs.kv_handles_min,
        kv,
        found.kv_handles,
        needs.mailbox,
    )
    return Catalog(granularity=PAGE, devices=entries, loaded=loaded), loaded, forecast


def plan_for(loaded: Loaded, forecast: MemoryForecast, target: Sequence[str]) -> Plan:
    sizes = sizes_of(loaded.spec, PAGE)
    return plan_way(loaded.layout, Target(devices=tuple(target)), sizes, forecast, DEVICES, Rates())


def staging_says_yes(catalog: Catalog, loaded: Loaded, legs: Sequence[Leg]) -> bool:
    """The HMM, asked for each of the legs as if those before had been done."""
    for leg in legs:
        request = StageLayout(TransitionId("op"), leg.layout, leg.copies, leg.kv_handles, leg.kv_handles_after)
        try:
            check_stage(catalog, loaded, request, 8)
        except DoesNotFit:
            return False
        loaded = msgspec.structs.replace(loaded, layout=leg.layout)
        kv = {entry.device: leg.kv_handles_after.get(entry.device, 0) for entry in catalog.devices}
        entries = tuple(DeviceEntry(e.device, e.budget, kv=(Span(0, PAGE),) * kv[e.device]) for e in catalog.devices)
        catalog = msgspec.structs.replace(catalog, devices=entries, loaded=loaded)
    return True


def with_least_kv(legs: Sequence[Leg], least: int) -> list[Leg]:
    """The same legs as modest as they can be."""
    return [
        msgspec.structs.replace(
            leg,
            kv_handles=dict.fromkeys(leg.kv_handles, least),
            kv_handles_after=dict.fromkeys(leg.kv_handles_after, least),
        )
        for leg in legs
    ]


def scattered(layout: Layout, seed: int) -> Layout:
    """With each expert anywhere, so that a device may both get and give some."""
    chance = random.Random(seed)
    homes = tuple(tuple((chance.choice(layout.slots),) for _ in experts) for experts in layout.homes)
    return msgspec.structs.replace(layout, homes=homes)


@settings_of_hypothesis(max_examples=300)
@given(
    MODELS,
    st.integers(1, 5),
    st.permutations(DEVICES),
    st.integers(1, 5),
    st.integers(0, 99),
    st.integers(0, 4),
    st.integers(-2, 2),
    st.sampled_from(["shm", "mailbox"]),
)
def test_all_draw_the_same_line(
    folder: Path,
    model: dict[str, int],
    num_used: int,
    order: list[str],
    num_wanted: int,
    seed: int,
    which: int,
    pages: int,
    exchange: str,
) -> None:
    """The budget is the one that an instant needs exactly, or a page or two beside it."""
    generous = settings_for(folder, model, 1 << 30, num_used, exchange)
    spec = load_spec(folder, generous.scaler.dtype)
    even = initial_layout(spec.num_experts_by_layer, DEVICES[:num_used])
    load = load_of(generous.scaler, spec, scattered(even, seed) if seed else even)
    catalog, loaded, forecast = loaded_at(load, spec, 1 << 40)
    roomy = plan_for(loaded, forecast, order[:num_wanted])
    instants = [(load.layout,)]
    for before, leg in zip((roomy.before, *(leg.layout for leg in roomy.legs)), roomy.legs, strict=False):
        instants += [(before, leg.layout), (leg.layout,)]
    budget = bytes_needed(spec, load, *instants[which % len(instants)]) + pages * PAGE
    is_up = up_says_yes(settings_for(folder, model, budget, num_used, exchange), folder)
    assert is_up == (budget >= bytes_needed(spec, load, even))
    for layout in (even, load.layout, roomy.after):
        there = msgspec.structs.replace(load, layout=layout)
        assert load_says_yes(there, spec, budget) == (budget >= bytes_needed(spec, there, layout))
    assume(load_says_yes(load, spec, budget))
    fits = all(budget >= bytes_needed(spec, load, *instant) for instant in instants)
    catalog, loaded, forecast = loaded_at(load, spec, budget)
    least = with_least_kv(roomy.legs, forecast.kv_handles_min)
    assert staging_says_yes(catalog, loaded, least) == fits
    try:
        plan = plan_for(loaded, forecast, order[:num_wanted])
    except DoesNotFit:
        assert not fits
    else:
        assert fits
        assert staging_says_yes(catalog, loaded, plan.legs)
