"""Compiles the candidates, side by side."""

from concurrent.futures import ThreadPoolExecutor

from bench.candidate_kernels import CANDIDATES, Candidate, compiled
from tw_kernels import cuda_build


def main() -> int:
    """0; 1 if one of them, which is named, does not compile; 2 if nothing can be compiled here."""
    if reason := cuda_build.why_not():
        print(reason)
        return 2

    def outcome(candidate: Candidate) -> str | None:
        try:
            print(f"{candidate.name}: {compiled(candidate)}")
        except RuntimeError as error:
            return f"{candidate.name}: {error}"

    with ThreadPoolExecutor() as pool:
        errors = [error for error in pool.map(outcome, CANDIDATES) if error]
    print("\n".join(errors), end="")
    return 1 if errors else 0


if __name__ == "__main__":
    raise SystemExit(main())
