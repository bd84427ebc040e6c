"""Codes of device backends (`common/devices`): each is a fault of ours, or of the machine."""

from __future__ import annotations

from elasticmoe.common.error_codes.code import Code

_REPORT = "Report it with the log"

DEVICES: dict[str, Code] = {
    "device_error": Code("A device call failed", "See the text: limits of the machine, or a fault of it"),
    "bad_granularity": Code("`granularity` is no multiple of the page size", "Use one that is"),
    "unknown_backend": Code("A device is of a kind that no backend has", "Use one of those that the text names"),
    "no_driver": Code("The library of a device's driver cannot be loaded", "Install it, as the text says"),
    "no_device": Code("The driver has no such device", "Name one that it shows, or make it visible"),
    "no_peer_access": Code(
        "A device cannot access another one's memory, which has to be",
        "As the text says: start with `--exchange shm`, or name other devices",
    ),
    "other_hardware": Code(
        "A rank sees other hardware than the HMM by a device's name",
        "Let all processes see the same devices: `CUDA_VISIBLE_DEVICES`, `ASCEND_RT_VISIBLE_DEVICES`",
    ),
    "no_process": Code(
        "A process that is to use a device cannot be started",
        "See the text: limits of the machine or of this user",
        is_retryable=True,
    ),
    "no_torch": Code("Torch cannot use the device", "Install the package or the build of torch that the text names"),
    "driver_failed": Code(
        "A device or its driver has failed; or an order needs a device that has",
        "See the text, and the driver's log; order it without the device, and replace that",
        (422,),
    ),
    "driver_refused": Code("A driver has refused a call", _REPORT),
    "not_admitted": Code("A process was not admitted to a shared handle, or before it had started", _REPORT),
    "already_imported": Code("A handle was imported twice", _REPORT),
    "export_and_import": Code("A handle was exported and imported by one process", _REPORT),
    "invalid_dtype": Code("A dtype that the backend does not have", _REPORT),
    "invalid_extent": Code("An extent lies outside its handle", _REPORT),
    "invalid_token": Code("A descriptor is not the memory that it should be", _REPORT),
    "mapping_live": Code("A handle was to be mapped where another one is", _REPORT),
    "mixed_range": Code("Own and imported handles were to be mapped in one range", _REPORT),
    "not_claimed": Code("Memory was to be made for a handle that is in use", _REPORT),
    "not_granular": Code("A size or offset is no multiple of the granularity", _REPORT),
    "not_local": Code("Another process's handle was to be exported or retired", _REPORT),
    "not_mapped": Code("An address is not mapped", _REPORT),
    "not_populated": Code("A handle was to be used before all its memory was there", _REPORT),
    "not_retired": Code("Memory of a handle that may be in use was to be given back", _REPORT),
    "not_settled": Code("A handle was to be exported before all its memory was there", _REPORT),
    "other_device": Code("A handle of another device was given", _REPORT),
    "out_of_range": Code("An access lies outside what is mapped", _REPORT),
    "range_too_large": Code("More address space was asked for than the backend reserves at once", _REPORT),
    "read_only": Code("What is read-only was to be written", _REPORT),
    "record_moved": Code("A record was to be mapped where another one is", _REPORT),
    "released": Code("The handle has been given back already", _REPORT),
    "still_mapped": Code("What is still mapped was to be given back", _REPORT),
}
