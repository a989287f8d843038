"""Imported before anything else of the project: this process runs commands on the pretended device."""

import pretend_device

pretend_device.patch()
