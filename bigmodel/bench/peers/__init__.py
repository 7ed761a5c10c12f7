"""Others that run models larger than memory, each at its best documented settings, behind one door."""
