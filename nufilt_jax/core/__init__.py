"""The method, each file a step of the paper's: filter, adapt (or closed_form), fuse, and forecast beside them.

Written for one layer; stages vmaps them over the layers of one width, and solve makes one program of the stages.
"""
