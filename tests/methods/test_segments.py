"""Segments in index space: no empty or inverted range anywhere, and the stock schedulers' times."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import DDIMScheduler, TCDScheduler

from stepdistill.core.denoiser import Prediction
from stepdistill.core.method import Setting
from stepdistill.core.path import FlowPath, VEPath, VPPath
from stepdistill.methods.grid import SolverGrid
from stepdistill.methods.segments import Segments, check_segments, jump

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
VP, FLOW, VE = VPPath.from_betas(BETAS), FlowPath(), VEPath()
PATHS = {"vp": VP, "flow": FLOW, "ve": VE}
ALMOST_1 = math.nextafter(1.0, 0.0)


def segments(num_grid: int, path=FLOW, shift: float = 1.0) -> Segments:
    return Segments(SolverGrid(Setting(path, "eps", shift), num_grid, "none"))


# ------------------------------------------------------------------------------ index arithmetic
@pytest.mark.parametrize("num_grid", range(1, 201))
def test_no_range_is_empty_or_inverted(num_grid):
    """Every K up to 200, every segment count that divides it, every index."""
    own, index = segments(num_grid), torch.arange(num_grid)
    for k in (k for k in range(1, num_grid + 1) if num_grid % k == 0):
        check_segments(num_grid, (k,))
        low, size = own.lower(index, k), num_grid // k
        assert bool((low <= index).all()), "the stop of a start's interval is inside its segment"
        assert bool((index + 1 <= low + size).all())
        assert bool((low % size == 0).all())
        assert torch.equal(own.draw_end(torch.zeros(num_grid).double(), index, k), low)
        last = own.draw_end(torch.full((num_grid,), ALMOST_1, dtype=torch.float64), index, k)
        assert torch.equal(last, index), "the stop itself can be drawn, nothing noisier"


def test_ends_are_uniform_over_the_segment():
    """K = 40, k = 4, start at point 18: ends 10 to 17, an eighth each."""
    u = (torch.arange(8000).double() + 0.5) / 8000
    ends = segments(40).draw_end(u, torch.full((8000,), 17), 4)
    assert torch.bincount(ends, minlength=18)[10:].tolist() == [1000] * 8


def test_an_edge_ends_the_segment_above_and_starts_in_the_one_below():
    own = segments(40)
    point_10, point_11 = torch.tensor([9]), torch.tensor([10])  # as starts
    assert own.lower(point_10, 4).tolist() == [0]
    assert own.lower(point_11, 4).tolist() == [10]


@pytest.mark.parametrize(("num_grid", "counts"), [(50, (8, 4, 2, 1)), (50, (4,)), (20, (8,))])
def test_grids_that_segments_cut_through_are_refused(num_grid, counts):
    with pytest.raises(ValueError, match=r"multiple of all segment counts.*Use 40 or 200"):
        check_segments(num_grid, counts)


# ------------------------------------------------------------------------------------ times
@pytest.mark.parametrize("num_grid", [40, 200])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_edges_are_trailing_ddim(num_grid, k):
    stock = DDIMScheduler(timestep_spacing="trailing")
    stock.set_timesteps(k)
    times = torch.tensor(segments(num_grid, VP).edges(k), dtype=torch.float64)
    assert VP.model_time(times).tolist() == stock.timesteps.tolist()


def test_edges_on_the_shifted_flow_grid():
    """3 t / (1 + 2 t) of 1, 3/4, 1/2, 1/4; each segment holds 10 of the 40 intervals."""
    own = segments(40, FLOW, 3.0)
    torch.testing.assert_close(own.edges(4), (1.0, 0.9, 0.75, 0.5))
    counts = torch.bincount(own.lower(torch.arange(40), 4))
    assert counts[counts > 0].tolist() == [10, 10, 10, 10]


@pytest.mark.parametrize("num_steps", range(1, 41))
def test_visit_is_what_stock_tcd_visits(num_steps):
    stock = TCDScheduler(original_inference_steps=40)
    stock.set_timesteps(num_steps)
    times = torch.tensor(segments(40, VP).visit(num_steps, 1), dtype=torch.float64)
    assert VP.model_time(times).tolist() == stock.timesteps.tolist()


@pytest.mark.parametrize("num_grid", [8, 40, 200])
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_visit_stops_at_every_edge_or_refuses(num_grid, k):
    own = segments(num_grid, FLOW, 3.0)
    for num_steps in range(num_grid + 2):
        if 1 <= num_steps <= num_grid and num_steps % k == 0:
            assert set(own.edges(k)) <= set(own.visit(num_steps, k))
        else:
            with pytest.raises(ValueError, match="every segment edge"):
                own.visit(num_steps, k)


@pytest.mark.parametrize("path", PATHS)
def test_noisier_times_lie_between_the_end_and_its_segments_top(path):
    own = segments(40, PATHS[path])
    for k in (1, 2, 4, 8):
        index = torch.arange(40).repeat(50)
        end = own.draw_end(torch.rand(2000).double(), index, k)
        for u in (torch.zeros(2000), torch.rand(2000), torch.full((2000,), ALMOST_1)):
            t = own.draw_noisier(u.double(), end, index, k)
            assert bool((t >= own.time(end)).all())
            assert bool((t <= own.time(own.lower(index, k) + 40 // k)).all())
            moved = t[t > 0]
            assert torch.equal(PATHS[path].snap(moved), moved)


def test_noisier_times_are_uniform_in_index_space():
    own = segments(40, FLOW, 3.0)
    u = torch.rand(20000, dtype=torch.float64)
    zeros = torch.zeros(20000, dtype=torch.long)
    t = own.draw_noisier(u, zeros, zeros, 1)
    above = own.time(torch.arange(41))
    share = torch.bucketize(t, above).bincount(minlength=42)[1:41] / 20000
    assert float((share - 1 / 40).abs().max()) < 0.006


# ------------------------------------------------------------------------------------- jumps
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "flow"])
@pytest.mark.parametrize("path", PATHS)
def test_a_jump_to_its_own_time_is_the_identity(path, kind):
    """Bit-exactly, whatever the network says, at every grid point and clean data."""
    own = segments(40, PATHS[path])
    t = own.points
    x_t, raw = torch.randn(41, 2, 2, 2), torch.randn(41, 2, 2, 2)
    assert torch.equal(jump(Prediction(raw, x_t, t, PATHS[path], kind), t), x_t)


@pytest.mark.parametrize("kind", ["x0", "v", "flow"])
@pytest.mark.parametrize("path", PATHS)
def test_a_jump_to_clean_data_is_x0(path, kind):
    t = segments(40, PATHS[path]).points[1:]
    x_t, raw = (torch.randn(40, 2, 2, 2, dtype=torch.float64) for _ in range(2))
    pred = Prediction(raw, x_t, t, PATHS[path], kind)
    torch.testing.assert_close(jump(pred, torch.zeros_like(t)), pred.x0, rtol=1e-9, atol=1e-9)
