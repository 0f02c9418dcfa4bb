"""How often the gate lets a version pass that is worse, and stops one that is not.

Exact, by the trinomial distribution: of the test images the candidate loses some that the version
in production names right, and wins 3 in 100. "coin" is the rule without a third verdict: not more
than 1 point lower as seen, and not lower beyond chance. Beside one version: each further one that
is compared with (register.gate.compared_versions) has to be passed, too.

Run:
    python benchmarks/gate.py
"""

import itertools

import numpy as np
from scipy import stats

from tlpipe.registry.gate import Bounds
from tlpipe.resampling import detectable_drop, paired_difference

WON, DROPS, SIZES = 0.03, (0.0, 0.02, 0.03, 0.05, 0.10), (50, 100, 200, 500)


def verdicts(images: int, drop: float) -> tuple[dict[str, float], float]:
    """Return how likely each outcome is at a true drop, and the mean drop that is said to show."""
    found = {"coin": 0.0, "holds": 0.0, "cannot tell": 0.0, "fails": 0.0}
    shown = total = 0.0
    lost = WON + drop
    groups = [str(number) for number in range(images)]
    for losses in range(int(stats.binom.ppf(1 - 1e-5, images, lost)) + 1):
        for gains in range(int(stats.binom.ppf(1 - 1e-5, images, WON)) + 1):
            counts = [losses, gains, images - losses - gains]
            chance = stats.multinomial.pmf(counts, images, [lost, WON, 1 - lost - WON])
            if chance < 1e-6:
                continue
            hits = np.ones((2, images), bool)
            hits[1, :losses] = hits[0, losses : losses + gains] = False
            change = paired_difference(hits[0], hits[1], groups, 0.95)
            bound = Bounds().max_accuracy_drop
            is_worse, is_near = change["high"] < 0, change["low"] >= -bound
            found["fails" if is_worse else "holds" if is_near else "cannot tell"] += chance
            found["coin"] += chance * (change["value"] >= -0.01 and not is_worse)
            shown += chance * detectable_drop(hits[0], hits[1], groups, 0.95)
            total += chance
    return found, shown / total


def main() -> None:
    """Print the table."""
    default = Bounds().max_accuracy_drop
    print(f"register.gate.max_accuracy_drop {default}, its default; 95 % intervals\n")
    for equal in itertools.count(1):
        right = np.ones(equal, bool)
        if paired_difference(right, right, [*map(str, range(equal))], 0.95)["low"] >= -default:
            break
    print(f"two that answer alike hold from {equal} independent test images on\n")
    print("test images  true drop   coin  |  holds  cannot tell  fails  |  shows a drop from")
    for images in SIZES:
        for drop in DROPS:
            found, shown = verdicts(images, drop)
            print(
                f"{images:11}  {drop:9.2f}  {found['coin']:5.2f}  |  {found['holds']:5.2f}  "
                f"{found['cannot tell']:11.2f}  {found['fails']:5.2f}  |  {shown:17.3f}"
            )


if __name__ == "__main__":
    main()
