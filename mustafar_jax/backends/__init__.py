"""Who computes: one record a backend (`record`), all of them and how one is chosen (`registry`)."""
