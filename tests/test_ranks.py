"""Several ranks make what one makes, bit by bit; a rank that is lost ends the work soon, with a state to go on from.

Ranks are threads here, each with a connection of its own, as real as those between processes; only what happens
to a process is tested with processes.
"""

import datetime
import shutil
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from watched import bits, stop_at

from d2 import launch
from d2.config import load
from d2.denoiser import UNetDenoiser
from d2.errors import D2Error, InputError, ResourceError, SetupError, Stopped, WorkerError
from d2.pair import load_models
from d2.phases import STATE
from d2.ranks import LeadingPair, serve, shares
from d2.run import Run
from d2.settings import GenerateConfig
from d2.shard import Group, share
from d2.snapshot import load as load_state

CPU = torch.device("cpu")


class Crew:
    """Ranks 1 and up as threads, and the pair that rank 0 works with."""

    def __init__(self, tiny, size, sets=()):
        self.store = dist.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        options = load(GenerateConfig, tiny / "preset.yaml", sets=sets)
        self.pairs = [load_models(options, tiny) for _ in range(size)]
        self.failed: list[D2Error] = []
        self.threads = [threading.Thread(target=self.help_out, args=(rank, size)) for rank in range(1, size)]
        for thread in self.threads:
            thread.start()
        self.group = Group(self.store, 0, size, CPU)
        self.pair = LeadingPair(self.pairs[0], self.group)

    def help_out(self, rank, size):
        store = dist.TCPStore("127.0.0.1", self.store.port, None, False, datetime.timedelta(seconds=60))
        with Group(store, rank, size, CPU) as group:
            try:
                serve(self.pairs[rank], group)
            except D2Error as error:
                self.failed.append(error)

    def let_go(self):
        for _ in launch._led(self.pair):
            pass
        for thread in self.threads:
            thread.join()
        self.group.__exit__()


@pytest.fixture
def generate_on(generate, tiny, monkeypatch):
    """d2.generate on some ranks, which are threads; gives the crew."""

    def run(size, source, out, **options):
        crew = Crew(tiny, size, options.get("sets", ()))
        whole = launch.contextlib.nullcontext(crew.pair)
        with monkeypatch.context() as patch:
            patch.setattr(launch, "gathered", lambda pair, settings, processes: whole)
            try:
                generate(source, out, **options)
            finally:
                crew.let_go()
        return crew

    return run


@pytest.mark.row(55)
@settings(max_examples=150, deadline=None)
@given(V=st.integers(1, 12), F=st.integers(1, 12), W=st.integers(1, 12), joined=st.booleans())
def test_row_55_every_cell_is_denoised_exactly_once_by_each_model(V, F, W, joined):
    columns = [list(range(F))] if joined else [[f] for f in range(F)]
    given_out = shares({"view": columns, "frame": [[v] for v in range(V)]}, {"view": V, "frame": F}, W)
    assert len(given_out) == W
    for model, count in (("view", F), ("frame", V)):
        assert sorted(line for mine in given_out for line in mine.get(model, [])) == list(range(count))


def test_work_is_spread_as_evenly_as_whole_lines_allow():
    costs = [21.0] * 25 + [25.0] * 21
    for ranks in (1, 2, 3, 8, 46, 64):
        loads = [sum(costs[piece] for piece in mine) for mine in share(costs, ranks)]
        assert max(loads) <= sum(costs) / ranks + 25
    assert max(sum(costs[piece] for piece in mine) for mine in share(costs, 8)) < 1.06 * sum(costs) / 8


@pytest.mark.row(55)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_ranks_gives_the_bits_of_one(generate_on, finished, clip, tmp_path, size):
    crew = generate_on(size, clip, tmp_path / "new")
    assert bits(tmp_path / "new") == bits(finished)
    assert crew.group.moved > 0 and not crew.failed
    assert not any(pair.unets for pair in crew.pairs)


@pytest.mark.parametrize("sets", [("conv_blend=0.6", "svd_cfg_warmup=true"), ("uc_type=mean", "method=heun")])
def test_columns_that_look_at_each_other_and_a_guidance_that_warms_up_are_shared_out_too(
    generate_on, generate, clip, tmp_path, sets
):
    generate(clip, tmp_path / "one", sets=sets)
    generate_on(2, clip, tmp_path / "two", sets=sets)
    assert bits(tmp_path / "one") == bits(tmp_path / "two")


def test_reused_features_are_the_same_for_any_number_of_ranks_and_after_a_stop(generate_on, generate, clip, tmp_path):
    # The view model drops out at half of the steps: from there on the rows lie on other ranks.
    sets = ("step_cache=3", "steps=5", "method=heun", "vrs_steps=2", "svd_only_from=0.5", "svd_cfg_warmup=true")
    generate(clip, tmp_path / "one", sets=sets)
    with pytest.raises(Stopped, match="at step 3 of 5"):
        generate_on(3, clip, tmp_path / "three", sets=sets, **stop_at("matrix", 6))
    generate_on(3, clip, tmp_path / "three", sets=sets)
    assert bits(tmp_path / "one") == bits(tmp_path / "three")


def test_cells_that_are_sampled_again_are_shared_out_too(generate_on, generate, clip, finished, tmp_path):
    other = shutil.copytree(finished, tmp_path / "other")
    generate(clip, finished, redo="views=1", sets=("seed=7",))
    generate_on(3, clip, other, redo="views=1", sets=("seed=7",))
    assert bits(other) == bits(finished)


@pytest.mark.row(58)
@pytest.mark.parametrize("fits", [1, 0])
def test_a_rank_whose_memory_runs_out_takes_fewer_lines_or_says_so(generate_on, clip, tmp_path, monkeypatch, fits):
    healthy = UNetDenoiser.__call__

    def small(self, x, sigma, cond):
        if threading.current_thread() is not threading.main_thread() and len(x) > 2 * fits:
            raise torch.OutOfMemoryError("too many")
        return healthy(self, x, sigma, cond)

    monkeypatch.setattr(UNetDenoiser, "__call__", small)
    sets = ("columns_in_flight=3", "rows_in_flight=3")
    if not fits:
        with pytest.raises(ResourceError, match=r"rank 1: out of memory with 1 .* saved"):
            generate_on(2, clip, tmp_path / "run", sets=sets)
        return
    generate_on(2, clip, tmp_path / "run", sets=sets)
    stage = Run.open(tmp_path / "run").stage("generate")
    assert stage is not None and set(stage["in_flight"].values()) == {1}


@pytest.mark.row(57)
@pytest.mark.parametrize(("number", "reason"), [(signal.SIGKILL, "rank 1 ended"), (signal.SIGSTOP, "no sign of life")])
def test_a_rank_that_is_killed_or_stopped_ends_the_run_with_7_and_the_run_goes_on_from_there(
    generate, clip, finished, tmp_path, monkeypatch, number, reason
):
    monkeypatch.setenv("MASTER_ADDR", "junk.invalid")  # row 57: somebody else's
    children = []
    start = launch._start
    monkeypatch.setattr(launch, "_start", lambda *words: children.append(start(*words)) or children[-1])
    out, sets = tmp_path / "lost", ("rank_timeout=8",)

    def strike():
        while not ((out / STATE).exists() and load_state(out / STATE).phase == "matrix"):
            time.sleep(0.002)
        children[0].send_signal(number)

    striker = threading.Thread(target=strike)
    striker.start()
    slow = UNetDenoiser.__call__
    monkeypatch.setattr(UNetDenoiser, "__call__", lambda *words: time.sleep(0.05) or slow(*words))
    with pytest.raises(WorkerError, match=reason + ".* saved, go on with: d2 generate .* --gpus 2") as caught:
        generate(clip, out, sets=sets, processes=2)
    striker.join()
    assert caught.value.exit_code == 7
    assert children[0].returncode == -signal.SIGKILL
    assert load_state(out / STATE).phase == "matrix"
    generate(clip, out, sets=sets, processes=2 if number == signal.SIGKILL else 1)
    assert bits(out) == bits(finished)
    assert all(child.returncode == 0 for child in children[1:])


@pytest.mark.row(60)
def test_a_gpu_that_is_not_there_and_compiling_without_one_are_refused(generate, tiny, clip, tmp_path):
    pair = load_models(load(GenerateConfig, tiny / "preset.yaml"), tiny, "cuda")
    with pytest.raises(SetupError, match=r"--gpus 64: torch sees \d"):
        launch._require_devices(pair.device, 64)
    with pytest.raises(InputError, match="compile graph: on a GPU only"):
        generate(clip, tmp_path / "run", sets=("compile=graph",), device="cpu")


@pytest.mark.row(57)
@pytest.mark.parametrize(("rank", "size"), [("x", "2"), ("2", "2"), ("-1", "2"), ("0", ""), ("1", "two")])
def test_variables_of_torchrun_that_it_never_sets_are_refused(monkeypatch, rank, size):
    for name, value in zip(launch.TORCHRUN, (rank, size, "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="RANK="):
        launch.of_torchrun()
