"""Make the folders that the stand-ins' recipes name:  python -m paper.standins.prepare"""

from __future__ import annotations

from delora.errors import UserError
from paper.standins import dinov2, fashion


def main() -> None:
    """Subjects and scenes from Fashion-MNIST, and the DINOv2 that judges pictures. A folder that exists is not made again."""
    try:
        for folder in (fashion.subjects(), fashion.scenes(), dinov2.prepared()):
            print(folder)
    except UserError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
