"""Draw which times training shows and inference visits, into docs/images/timesteps.png; print the table beside it."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import torch

from sidestep.training.flow import LargerOfTwo, LogitNormal, TimestepConfig, Turbo, Uniform

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "images" / "timesteps.png"
DRAWS = 1_000_000
OPTIONS: dict[str, TimestepConfig] = {
    "acestep": LargerOfTwo(mean=-0.4, std=1.0),
    "logit_normal": LogitNormal(mean=-0.4, std=1.0),
    "uniform": Uniform(),
    "turbo": Turbo(),
}


def main() -> None:
    """Draw and print."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    print("| `timesteps` | mean | below 0.25 | 0.25 to 0.5 | 0.5 to 0.75 | above 0.75 |\n|---|---|---|---|---|---|")
    for name, config in OPTIONS.items():
        t = config.sample(DRAWS, torch.Generator().manual_seed(0))
        shares = torch.histc(t.clamp(0, 0.999999), 4, 0, 1) / DRAWS
        print(f"| {name} | {t.mean():.3f} | {' | '.join(f'{100 * share:.1f} %' for share in shares.tolist())} |")
        if name == "turbo":
            left.vlines(t.unique(), 0, 0.4, color="C3", label="turbo: eight times, equally often")
        else:
            density = torch.histc(t, 100, 0, 1) / DRAWS * 100
            left.plot(torch.linspace(0.005, 0.995, 100), density, label=name)
    left.set(title="Times that training draws", xlabel="t (1 is noise)", ylabel="density", xlim=(0, 1), ylim=(0, 2.4))
    left.legend(fontsize=8, loc="upper center", ncols=2)
    u = torch.linspace(0, 1, 200)
    for shift, steps in ((1.0, 50), (3.0, 8)):
        line = right.plot(1 - u, shift * u / (1 + (shift - 1) * u), label=f"shift {shift:g}")[0]
        at = 1 - torch.arange(steps) / steps
        right.plot(1 - at, shift * at / (1 + (shift - 1) * at), ".", color=line.get_color(), label=f"{steps} steps")
    right.set(
        title="Times that sampling visits", xlabel="share of the steps done", ylabel="t", xlim=(0, 1), ylim=(0, 1.02)
    )
    right.legend(fontsize=8)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=100)


if __name__ == "__main__":
    main()
