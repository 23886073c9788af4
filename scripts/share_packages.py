"""Lets another environment import the packages of this one, but for those that it has itself.

python scripts/share_packages.py ENVIRONMENT
"""

import sys
import sysconfig
from pathlib import Path

(folder,) = Path(sys.argv[1]).glob("lib/python*/site-packages")
(folder / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
