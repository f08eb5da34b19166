"""A differentiable renderer with a real 3-D parameter: a grid of density and colour, ray-marched.

Small on purpose, for tests and for the digits' teacher; any module that returns images (B, 3, H, W)
takes its place (particles/README.md). Emission and absorption as in NeRF: Mildenhall et al. 2020,
arXiv:2003.08934, Eq. 3. Cameras look at the origin, down their own -z (OpenGL).
"""

# Shapes: B cameras, D voxels to a side, H, W in px, N samples of a ray.

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

RADIUS, HALF_VIEW = 2.5, 0.5  # of the camera's orbit (the grid fills [-1, 1]^3); tan of half a view


def orbit(azimuth: Tensor, elevation: Tensor) -> Tensor:
    """Camera-to-world (B, 4, 4) on the orbit; angles (B,) in radians, 0 on the +z axis."""
    flat = elevation.cos() * azimuth.sin(), elevation.sin(), elevation.cos() * azimuth.cos()
    back = torch.stack(flat, -1)
    up = torch.tensor([0.0, 1.0, 0.0]).to(back).expand_as(back)
    right = F.normalize(torch.linalg.cross(up, back), dim=-1)
    columns = (right, torch.linalg.cross(back, right), back, RADIUS * back)
    pose = torch.stack(columns, -1)
    last = torch.tensor([0.0, 0.0, 0.0, 1.0]).to(pose).expand(len(pose), 1, 4)
    return torch.cat([pose, last], 1)


class VoxelScene(nn.Module):
    """density and colour (1, 4, D, D, D), before softplus and sigmoid; a soft ball at first."""

    def __init__(self, size: int, generator: torch.Generator) -> None:
        super().__init__()
        axis = torch.linspace(-1, 1, size)
        square = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2
        grid = 0.1 * torch.randn(1, 4, size, size, size, generator=generator)
        grid[:, 0] += 1.0 - 5.0 * square
        self.grid = nn.Parameter(grid)

    def forward(self, camera: Tensor, height: int, width: int, num_samples: int = 32) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] on black, with graph. Args: camera: (B, 4, 4)."""
        ys = HALF_VIEW * (1 - 2 * (torch.arange(height) + 0.5) / height)
        xs = HALF_VIEW * (2 * (torch.arange(width) + 0.5) / width - 1)
        y, x = torch.meshgrid(ys, xs, indexing="ij")
        rays = torch.stack([x, y, -torch.ones_like(x)], -1).to(camera)  # (H, W, 3), the camera's
        rays = torch.einsum("bij,hwj->bhwi", camera[:, :3, :3], rays)
        reach = math.sqrt(3)
        depths = torch.linspace(RADIUS - reach, RADIUS + reach, num_samples).to(camera)
        points = camera[:, None, None, None, :3, 3] + depths.view(-1, 1, 1, 1) * rays[:, None]
        solid, colour = F.softplus(self.grid[:, :1]), torch.sigmoid(self.grid[:, 1:])
        both = torch.cat([10 * solid, colour], 1).expand(len(camera), -1, -1, -1, -1)
        seen = F.grid_sample(both, points, padding_mode="border", align_corners=True)
        within = (points.abs().amax(-1) <= 1).to(seen).unsqueeze(1)  # (B, 1, N, H, W)
        passed = torch.exp(-seen[:, :1] * within * (2 * reach / num_samples))
        light = torch.cat([torch.ones_like(passed[:, :, :1]), passed[:, :, :-1]], 2).cumprod(2)
        return 2 * (light * (1 - passed) * seen[:, 1:]).sum(2) - 1


def turntable(scene: VoxelScene, num_views: int, side: int) -> Tensor:
    """Images (V, 3, side, side) in [-1, 1] of a full turn at the height of the equator."""
    azimuth = torch.arange(num_views) * (2 * math.pi / num_views)
    with torch.no_grad():
        return scene(orbit(azimuth, torch.zeros(num_views)), side, side)
