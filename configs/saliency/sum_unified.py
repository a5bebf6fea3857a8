# The authors' training (Arhosseini77/SUM, train.py), on all of their data: below train/images, train/maps and so on a folder for each set
_base_ = ['./sum_salicon.py']

data_root = 'data/looks'
kinds = dict(conditions=dict(salicon=0, osie=1, cat2000=1, mit1003=1, salec=2, ui=3))

train_dataloader = dict(dataset=kinds)
val_dataloader = dict(dataset=kinds)
test_dataloader = val_dataloader

del kinds
