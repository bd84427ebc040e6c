"""HTTP as both listeners speak it: the guarded connection, the door before every application, one shape of errors."""
