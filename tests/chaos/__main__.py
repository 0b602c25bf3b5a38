"""Faults on purpose, long: `python -m tests.chaos` runs what is missing, appends its results, and writes the table.

    python -m tests.chaos                        # every row to its number of trials (make chaos)
    python -m tests.chaos --rows T1 --seed 17    # one case again, by the seed that was printed
    python -m tests.chaos --tests                # the rows that tests prove, run now
    python -m tests.chaos --tests L3 T17         # these rows alone; trials of one commit add up
    python -m tests.chaos --table                # only write docs/faults.md again

It may be stopped and started again: what is recorded for this commit is not repeated.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
os.environ["PYTHONWARNINGS"] = "ignore"

import argparse
import random
import sys
from pathlib import Path

from tests.chaos import table
from tests.chaos.cases import Room
from tests.chaos.catalogue import CASES, TRIALS
from tests.chaos.fleet import import_everything


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--seed", type=int, help="one case with this seed, nothing recorded")
    parser.add_argument("--tests", nargs="*", metavar="ROW", help="run the tests that prove the other rows")
    parser.add_argument("--report", type=Path, help="take the rows of tests from this report of pytest (--junitxml)")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    failed = False
    if arguments.tests is not None:
        failed = table.run_tests(arguments.tests)
    elif arguments.report is not None:
        failed = table.read_tests(arguments.report)
    elif not arguments.table:
        import_everything()
        room = Room()
        try:
            failed = _run(arguments, room)
        finally:
            room.close()
    if arguments.seed is None:
        table.write()
    return int(failed)


def _run(arguments: argparse.Namespace, room: Room) -> bool:
    """Whether any case lost something or went wrong."""
    bad = False
    for row in arguments.rows:
        trials = table.recorded(row)
        while trials < TRIALS[row]:
            seed = random.randrange(10**9) if arguments.seed is None else arguments.seed
            result = CASES[row](room, random.Random(seed))
            trials += result.trials
            recover = f", recovered in {max(result.recover_s):.1f} s at most" if result.recover_s else ""
            print(f"{row} seed {seed}: {result.trials} faults, {result.losses} losses{recover}", flush=True)
            for problem in result.problems:
                print(f"    {problem}", flush=True)
            bad = bad or bool(result.losses or result.problems)
            if arguments.seed is not None:
                return bad
            table.append(row, seed, result)
    return bad


if __name__ == "__main__":
    sys.exit(main())
