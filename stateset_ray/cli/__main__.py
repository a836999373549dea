"""`python -m stateset_ray.cli`."""

from stateset_ray.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    main()
