"""Time of the EROFS writer and reader: `python -m tests.benchmarks.bench_erofs [repetitions]`.

Trees are shaped like a distribution's (folders of 30 entries, a tenth of them symlinks, every time its own). Prints the
median and the spread per size; the targets are 350 ms for 13,000 entries and 3,000 ms for 100,000.
"""

import resource
import statistics
import sys
import time
from collections.abc import Callable

from fsmount.erofs import ImageReader, write_image
from tests.erofs_trees import wide_tree


def _measure(job: Callable[[], object], repetitions: int) -> str:
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        job()
        times.append((time.perf_counter() - started) * 1000)
    return f"{statistics.median(times):7.0f} ms ({min(times):.0f} to {max(times):.0f})"


def main() -> None:
    repetitions = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    for entries in (13_000, 100_000):
        root, size = wide_tree(entries)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        image = write_image(root, volume_size=size)
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        written = _measure(lambda root=root, size=size: write_image(root, volume_size=size), repetitions)
        reader = ImageReader(image)
        walked = _measure(lambda reader=reader: sum(1 for _ in reader.walk()), repetitions)
        print(
            f"{entries:7} entries: write {written}, peak +{growth // 1024} MiB, image {len(image) / 2**20:.1f} MiB; walk {walked}"
        )


if __name__ == "__main__":
    main()
