"""The learning task: a small CNN that names one of ten 8x8 patterns under noise."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 10
ROWS_PER_CLIENT = 320
TEST_ROWS = 500


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.fc1 = nn.Linear(16 * 4 * 4, 32)
        self.fc2 = nn.Linear(32, CLASSES)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def _patterns():
    return torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def _rows(count, seed, favourites=None):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    if favourites is not None:
        # Half of a client's rows show its own three patterns: clients differ.
        mine = torch.randint(0, 3, (count // 2,), generator=generator)
        labels[: count // 2] = (favourites + mine) % CLASSES
    noise = torch.randn(count, 1, 8, 8, generator=generator)
    return TensorDataset(_patterns()[labels] + 0.8 * noise, labels)


def load_data(partition_id):
    """A client's training and validation rows."""
    train = _rows(ROWS_PER_CLIENT, 100 + partition_id, favourites=partition_id)
    valid = _rows(60, 200 + partition_id, favourites=partition_id)
    order = torch.Generator().manual_seed(partition_id)
    return (
        DataLoader(train, batch_size=32, shuffle=True, generator=order),
        DataLoader(valid, batch_size=64),
    )


def load_test_data():
    """The server's rows: all patterns equally."""
    return DataLoader(_rows(TEST_ROWS, 9), batch_size=250)


def train(net, loader, epochs, lr):
    """Train in place; returns the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    net.train()
    total = 0.0
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / (epochs * len(loader))


def test(net, loader):
    """Mean loss and accuracy."""
    net.eval()
    loss, correct, rows = 0.0, 0, 0
    with torch.no_grad():
        for images, labels in loader:
            scores = net(images)
            loss += F.cross_entropy(scores, labels, reduction="sum").item()
            correct += (scores.argmax(1) == labels).sum().item()
            rows += len(labels)
    return loss / rows, correct / rows
