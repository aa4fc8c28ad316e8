"""The small world that `kleash demo` is played in."""
