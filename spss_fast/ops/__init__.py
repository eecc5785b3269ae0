"""The public operators of the method: warping, uncertainty selection, contrastive loss, label propagation, losses."""
