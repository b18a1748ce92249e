"""What tests/bench/gpu.py compares with: eager loops of timm networks, and the published input pipelines."""

import copy
import random
import time

import timm
import torch
import torch.nn.functional as F
from PIL import Image


def plain_step(name, module, batch, size, device):
    """A function that makes one step of timm's network in an eager loop under autocast, or None."""
    vit = lambda: timm.create_model("vit_small_patch16_224", in_chans=1, num_classes=0, drop_path_rate=0.1)
    x = torch.randn(2, batch, 1, size, size, device=device)
    teacher = None
    if name == "gmml":
        model, mask = module.GMML(vit(), 1).to(device), torch.rand(batch, size, size, device=device) < 0.6
        loss = lambda: sum(((model(view) - view).abs() * mask[:, None]).sum() / mask.sum() for view in x) / 2
    elif name == "dino":
        model = module.DINO(vit()).to(device)
        for drop_path in model.drop_paths:
            drop_path.kept = torch.ones(1, device=device)
        teacher = copy.deepcopy(model).eval()
        local = torch.randn(8, batch, 1, 96, 96, device=device)

        def loss():
            with torch.no_grad():
                targets = (teacher([x])[0].float() / 0.04).softmax(-1)
            logs = (model([x, local])[0].float() / 0.1).log_softmax(-1)
            pairs = [(i, j) for i in range(2) for j in range(10) if i != j]
            return sum(-(targets[i] * logs[j]).sum(-1).mean() for i, j in pairs) / len(pairs)
    elif name in ("classify", "classify resnet50", "supervised"):
        arch, depth = ("resnet50", 0.0) if "resnet50" in name else ("vit_small_patch16_224", 0.1)
        model = timm.create_model(arch, in_chans=1, num_classes=14, drop_path_rate=depth).to(device)
        loss = lambda: F.binary_cross_entropy_with_logits(model(x[0]), torch.zeros(batch, 14, device=device))
    else:
        return None
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        with torch.autocast(device, torch.bfloat16):
            value = loss()
        optimizer.zero_grad()
        value.backward()
        for parameter in model.parameters() if "classify" not in name else ():
            torch.nn.utils.clip_grad_norm_([parameter], 3.0)
        optimizer.step()
        with torch.no_grad():
            for slow, fast in zip(teacher.parameters(), model.parameters()) if teacher else ():
                slow.mul_(0.996).add_(0.004 * fast)
    return step


def published_views(name, size):
    """What a loader of GMML or DINO does with one image, by Pillow and torchvision."""
    import torchvision.transforms as T
    from PIL import ImageFilter
    blurred = T.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2))))

    def view(side, scale, jitter, p_jitter, p_grey, p_blur, p_solarise):
        return T.Compose([
            T.RandomResizedCrop(side, scale, interpolation=T.InterpolationMode.BICUBIC),
            T.RandomHorizontalFlip(), T.RandomApply([T.ColorJitter(*jitter)], p_jitter),
            T.RandomGrayscale(p_grey), T.RandomApply([blurred], p_blur), T.RandomSolarize(128, p_solarise),
            T.ToTensor(), T.Normalize([0.485], [0.229])])
    if name == "dino":
        strong = (0.4, 0.4, 0.2, 0.1), 0.8, 0.2
        crops = [view(size, (0.4, 1), *strong, blur, sun) for blur, sun in ((1.0, 0.0), (0.1, 0.2))]
        crops += [view(size * 96 // 224, (0.05, 0.4), *strong, 0.5, 0.0)] * 8
        return lambda image: [crop(image) for crop in crops]
    light = view(size, (0.05, 1), (0.1, 0.1, 0.1, 0.01), 0.3, 0.0, 0.1, 0.0)

    def dropped(image):                                 # block after block of noise
        corrupted, mask = image.clone(), torch.zeros(size, size, dtype=torch.bool)
        while mask.float().mean() < random.uniform(0.5, 0.75):
            top, left = random.randrange(size), random.randrange(size)
            high, wide = (random.randrange(1, int(0.3 * size)) for _ in range(2))
            mask[top:top + high, left:left + wide] = True
            corrupted[:, top:top + high, left:left + wide].normal_()
        return image, corrupted, mask
    return lambda image: [dropped(light(image)), dropped(light(image))]


class OneByOne(torch.utils.data.Dataset):
    """Packed images, each through a transform."""

    def __init__(self, images, transform):
        self.images, self.transform = images, transform

    def __len__(self):
        return 10 ** 6

    def __getitem__(self, place):
        return self.transform(Image.fromarray(self.images[place % len(self.images)]))


def pipeline_rate(name, images, size, workers, batch, n):
    """Images a second that the published loader gives; the first batch of each worker is left out."""
    loader = torch.utils.data.DataLoader(OneByOne(images, published_views(name, size)), batch,
                                         num_workers=workers, multiprocessing_context="fork")
    batches, times = iter(loader), []
    for _ in range(workers + n):
        next(batches)
        times.append(time.perf_counter())
    return n * batch / (times[-1] - times[workers - 1])
