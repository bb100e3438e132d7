// From an image to a model's input, as "preprocessing" in model.json says.
//
// A canvas's own scaling differs from browser to browser, and from Pillow's, with which the model was trained and
// measured. So the scaling here is Pillow's: each pixel is a weighted mean of all that it covers.

const cubic = (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0);
const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

// How far each filter reaches, and its weight at a distance, both in pixels.
const FILTERS = {
  bilinear: [1, (x) => Math.max(0, 1 - x)],
  bicubic: [2, cubic],
  lanczos: [3, (x) => (x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

/** The input of the model: float32, (channels, height, width) in one row. `pixels` is an ImageData. */
export function preprocess(pixels, how) {
  const filter = FILTERS[how.interpolation];
  if (!filter) throw new Error(`model.json asks for the interpolation "${how.interpolation}"; here are ${Object.keys(FILTERS).join(", ")}.`);
  const planes = split(pixels.data, how.mode);
  const [width, height] = scaledTo(pixels.width, pixels.height, how.resize, how.fit);
  const [cropHeight, cropWidth] = how.crop;
  const [left, top] = [middle(width, cropWidth), middle(height, cropHeight)];
  const input = new Float32Array(planes.length * cropHeight * cropWidth);
  planes.forEach((plane, channel) => {
    const scaled = scale(plane, pixels.width, pixels.height, width, height, filter);
    for (let y = 0; y < cropHeight; y++) {
      for (let x = 0; x < cropWidth; x++) {
        const [row, column] = [y + top, x + left];
        const inside = row >= 0 && row < height && column >= 0 && column < width;
        const value = (inside ? scaled[row * width + column] : roundEven(255 * how.mean[channel])) / 255;
        input[(channel * cropHeight + y) * cropWidth + x] = (value - how.mean[channel]) / how.std[channel];
      }
    }
  });
  return input;
}

/** One plane of bytes for each channel, from red, green, blue and alpha in turns. */
function split(data, mode) {
  const count = data.length / 4;
  if (mode === "RGB") return [0, 1, 2].map((channel) => Uint8ClampedArray.from({ length: count }, (_, k) => data[4 * k + channel]));
  const grey = (k) => (19595 * data[k] + 38470 * data[k + 1] + 7471 * data[k + 2] + 32768) >> 16;
  return [Uint8ClampedArray.from({ length: count }, (_, k) => grey(4 * k))];
}

/** Width and height of an image that is to cover `resize` (height, width), lie inside of it, or stretch to it. */
function scaledTo(width, height, resize, fit) {
  if (fit === "stretch") return [resize[1], resize[0]];
  if (fit === "inside") {
    const ratio = Math.max(height / resize[0], width / resize[1]);
    return [roundEven(width / ratio), roundEven(height / ratio)];
  }
  if (resize[0] === resize[1]) {
    const short = Math.min(width, height);
    return [Math.floor((resize[0] * width) / short), Math.floor((resize[0] * height) / short)];
  }
  const ratio = Math.min(height / resize[0], width / resize[1]);
  return [roundEven(width / ratio), roundEven(height / ratio)];
}

/** Where the middle `want` of `have` pixels begin; below 0 where there are fewer. */
function middle(have, want) {
  return have >= want ? roundEven((have - want) / 2) : -Math.floor((want - have) / 2);
}

/** Python's rounding: halves go to the even neighbour. */
function roundEven(x) {
  const low = Math.floor(x);
  return x - low === 0.5 ? low + (low % 2) : Math.round(x);
}

/** A plane in another size: first its rows, then its columns, rounded to bytes after each. */
function scale(plane, width, height, newWidth, newHeight, filter) {
  const rows = width === newWidth ? plane : along(plane, width, 1, newWidth, 1, height, width, newWidth, filter);
  return height === newHeight ? rows : along(rows, height, newWidth, newHeight, newWidth, newWidth, 1, 1, filter);
}

/** `lines` lines of `size` values, `step` apart, become lines of `newSize`; lines start `stride` apart. */
function along(plane, size, step, newSize, newStep, lines, stride, newStride, [reach, weight]) {
  const out = new Uint8ClampedArray(lines * newSize);
  const ratio = size / newSize;
  const wide = Math.max(ratio, 1);
  for (let k = 0; k < newSize; k++) {
    const middle = (k + 0.5) * ratio;
    const first = Math.max(0, Math.floor(middle - reach * wide + 0.5));
    const last = Math.min(size, Math.floor(middle + reach * wide + 0.5));
    const weights = Array.from({ length: last - first }, (_, j) => weight(Math.abs(first + j - middle + 0.5) / wide));
    const total = weights.reduce((sum, one) => sum + one, 0);
    for (let line = 0; line < lines; line++) {
      let sum = 0;
      for (let j = 0; j < weights.length; j++) sum += weights[j] * plane[line * stride + (first + j) * step];
      out[line * newStride + k * newStep] = Math.floor(sum / total + 0.5);
    }
  }
  return out;
}
