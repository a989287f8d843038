"""The selective scan: the definition (`reference`), its fast implementations, and the operator over them."""

from mambacore.scan.operator import selective_scan
from mambacore.scan.reference import selective_scan_reference

__all__ = ["selective_scan", "selective_scan_reference"]
