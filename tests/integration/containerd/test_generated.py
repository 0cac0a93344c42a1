"""The committed protobuf code is what the pinned containerd API generates."""

import subprocess
import sys
from pathlib import Path

from tests.containerd_service import REPOSITORY


def test_protobuf_code_is_fresh(containerd_tools: Path) -> None:
    script = REPOSITORY / "tests" / "conformance" / "generate_proto.py"
    done = subprocess.run([sys.executable, script, "--check"], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
