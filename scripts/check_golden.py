#!/usr/bin/env python
"""Run a folder of golden cases through `samplers` and compare with the results of the official implementations.

    python scripts/check_golden.py DIR [--only SOLVER ...] [--skip SOLVER ...] [--quiet]

DIR has index.json and arrays.npz. Prints one line per case and `N cases, N passed, N unsupported`. Exits with 1 if any
case failed or is unsupported, with 2 if nothing was selected.

A case passes within its own absolute tolerance, or within 1e-13 of its largest output if that is more. The latter is
for a few of EDM's ablations, which end at 1e6, where rounding alone is above 1e-9. (Moving the initial noise by one
unit in the last place moves them by 7e-9.) Their lines name that limit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from golden import Golden, Unsupported


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", metavar="SOLVER", help="run only these solvers' cases")
    parser.add_argument("--skip", nargs="+", metavar="SOLVER", default=[], help="leave these solvers' cases out")
    parser.add_argument("--quiet", action="store_true", help="print failures and the summary only")
    args = parser.parse_args(argv)
    for name in ("index.json", "arrays.npz"):
        if not (args.folder / name).is_file():
            parser.error(f"{args.folder} has no {name}")
    torch.set_num_threads(1)
    golden = Golden(args.folder)
    cases = golden.index["cases"]
    solvers = {c["solver"] for c in cases}
    for name in [*(args.only or []), *args.skip]:
        if name not in solvers:
            parser.error(f"no case of solver {name!r}; the folder has {', '.join(sorted(solvers))}")
    cases = [c for c in cases if (not args.only or c["solver"] in args.only) and c["solver"] not in args.skip]
    passed = unsupported = 0
    for case in cases:
        try:
            gap = golden.run(case)
            tol, resolution = case["tol"], golden.resolution(case)
            good = gap <= max(tol, resolution)
            passed += good
            limit = f"tol {tol:.0e}" if gap <= tol or not good else f"tol {tol:.0e}, float64 resolves {resolution:.0e}"
            verdict = f"{'pass' if good else 'FAIL'}  {gap:.1e} ({limit})"
        except Unsupported as why:
            unsupported, good, verdict = unsupported + 1, True, f"unsupported  {why}"
        except Exception as error:
            good, verdict = False, f"FAIL  {type(error).__name__}: {error}"
        if not (args.quiet and good):
            print(f"{case['id']}  {verdict}")
    print(f"{len(cases)} cases, {passed} passed, {unsupported} unsupported")
    return 2 if not cases else int(passed != len(cases))


if __name__ == "__main__":
    sys.exit(main())
