"""Make what the stand-ins' recipes name, as folders of the ordinary kind:  python -m paper.standins.prepare"""

from __future__ import annotations

from delora.errors import UserError
from paper.standins import dinov2, fashion


def main() -> None:
    """Subjects and scenes out of Fashion-MNIST, and the DINOv2 that judges pictures; what is there is not made again."""
    try:
        for folder in (fashion.subjects(), fashion.scenes(), dinov2.prepared()):
            print(folder)
    except UserError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
