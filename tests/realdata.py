"""Where the real images for tests lie, and marks that skip a test, saying so, where there are none.

The folder ``shared/data`` beside the checkout (or ``BDKD_TEST_DATA``) holds CIFAR-100 and photographs.
"""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("BDKD_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
CIFAR100 = DATA / "cifar100"
CLOTHING = DATA / "clothing"

needs_cifar100 = pytest.mark.skipif(not CIFAR100.is_dir(), reason=f"real images absent: {CIFAR100}")
needs_clothing = pytest.mark.skipif(not CLOTHING.is_dir(), reason=f"real images absent: {CLOTHING}")
