"""Where the Triton kernels are found: beside the package in a checkout, in it once it is installed."""

from pathlib import Path

import las_fast.kernels
from las_fast.kernels import folders

ROOT = Path(__file__).resolve().parents[1]


def test_kernels_of_a_checkout_are_those_in_its_top_level_folder(tmp_path):
    assert str(ROOT / "kernels") in las_fast.kernels.__path__
    package = tmp_path / "las_fast" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    assert folders(package / "__init__.py") == []
    (tmp_path / "kernels").mkdir()
    (tmp_path / "link").symlink_to(package)
    assert folders(package / "__init__.py") == folders(tmp_path / "link" / "__init__.py") == [str(tmp_path / "kernels")]
