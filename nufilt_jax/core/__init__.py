"""The method, for one layer and then vmapped: filter, adapt, closed form, fuse; stages and solve put them together."""
