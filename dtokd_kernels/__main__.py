"""`python -m dtokd_kernels`: what was built, what is chosen, and why."""

from .backends import backend_info


def main() -> None:
    """Print `backend_info`, one line each."""
    for name, value in backend_info().items():
        print(f"{name:16} {value}")


if __name__ == "__main__":
    main()
