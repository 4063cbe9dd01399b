import subprocess
import sys

import torch

from train.rng import generator, seed_of, uniform


def test_seed_is_63_bits_and_tells_types_and_borders_apart():
    seeds = [seed_of(1), seed_of("1"), seed_of("ab", "c"), seed_of("a", "bc"), seed_of(1, 2)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_seed_is_the_same_in_another_process():
    code = "from train.rng import seed_of; print(seed_of(7, 'noise', 2**40))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert int(out.stdout) == seed_of(7, "noise", 2**40)


def test_generator_repeats_for_the_same_parts_only():
    def draw(*parts):
        return torch.randn(8, generator=generator("cpu", *parts))

    assert torch.equal(draw(1, "noise", 3), draw(1, "noise", 3))
    assert not torch.equal(draw(1, "noise", 3), draw(1, "noise", 4))


def test_uniform_has_the_moments_of_a_uniform_law():
    draws = torch.tensor([uniform(0, "u", i) for i in range(4000)])
    assert draws.min() > 0 and draws.max() < 1
    assert abs(draws.mean() - 1 / 2) < 3 * (1 / 12 / 4000) ** 0.5
    assert abs(draws.var() - 1 / 12) < 0.005
