"""Fetch the chart library of the market page, TradingView's Lightweight Charts (Apache 2.0), and check its digest.

python scripts/vendor_charts.py: writes cryptoresearch/serving/static/lightweight-charts.js and its licence.
"""

import base64
import hashlib
import io
import os
import sys
import tarfile
import urllib.request
from pathlib import Path

VERSION = "5.2.1"
SHA512 = "IVwoK1RLFiLPubaKIjNbtjWLnpPMqiABSrTay6whmNa8L1+19292VtHJ+BWyPUuLCwF0tcQlhEWd1CLB2a1nsQ=="
REGISTRY = os.environ.get("NPM_CONFIG_REGISTRY", "https://registry.npmjs.org/")
STATIC = Path(__file__).resolve().parents[1] / "cryptoresearch" / "serving" / "static"
FILES = {"package/dist/lightweight-charts.standalone.production.js": "lightweight-charts.js", "package/LICENSE": "lightweight-charts.LICENSE"}


def main() -> int:
    with urllib.request.urlopen(f"{REGISTRY.rstrip('/')}/lightweight-charts/-/lightweight-charts-{VERSION}.tgz", timeout=60) as answer:
        archive = answer.read()
    if (found := base64.b64encode(hashlib.sha512(archive).digest()).decode()) != SHA512:
        print(f"the archive has the SHA-512 {found}, not {SHA512}: nothing was written", file=sys.stderr)
        return 1
    with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
        for name, ours in FILES.items():
            member = packed.extractfile(name)
            assert member is not None, name
            (STATIC / ours).write_bytes(member.read())
    print(f"lightweight-charts {VERSION} is in {STATIC}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
