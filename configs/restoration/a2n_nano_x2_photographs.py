# Seven photographs that scikit-image and scikit-learn ship; astronaut, chelsea and coffee are held out
_base_ = ['../_base_/datasets/photographs.py', '../_base_/schedules/adam_60e_pictures.py', '../_base_/default_runtime.py']

model = dict(type='Restorer', name='a2n_nano_x2')
