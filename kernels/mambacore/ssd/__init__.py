"""The state space dual scan: the definition (`reference`), its chunked implementations, and the operator over them."""

from mambacore.ssd.operator import ssd_scan
from mambacore.ssd.reference import ssd_scan_reference

__all__ = ["ssd_scan", "ssd_scan_reference"]
