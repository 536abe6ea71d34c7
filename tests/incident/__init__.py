"""The failure that relay was written for, reproduced beside relay."""
