"""Where labelled images come from: which files there are, and under which labels.

In: a folder, an archive, an address or a built-in set, as class folders, a table, COCO or VOC.
Out: candidates, each a file or a part of one with its label. No image is opened here.
"""
