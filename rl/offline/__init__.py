"""Off-policy learning on top of a frozen VLA: conservative critics over chunks, from logged data and then online."""
