"""Instruments: one concern each, stackable context managers on a device."""
