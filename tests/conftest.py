"""Makes the five files importable from wherever pytest is started, and points to optional third-party data."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("SHARED_DIR", ROOT.parent / "shared"))


def shared(path):
    """A file of third-party data that is not ours to commit; the test is skipped where it is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"needs third-party data: {SHARED / path} (set SHARED_DIR)")
    return SHARED / path


@pytest.fixture(scope="session")
def toy_tree(tmp_path_factory):
    """A small ShapesWorld for the whole session."""
    import data
    folder = tmp_path_factory.mktemp("data") / "toy"
    data.make_toy(folder, scenes=300)
    return folder
