// Formats as numbers: what a code means, and which code a number gets. All values come from the tables that the
// library exported; the rules of rounding are those of docs/formats.md, "Encoding", in binary32 (Math.fround).

const tables = JSON.parse(document.getElementById("tables").textContent);
const layouts = new Map(tables.floats.map((layout) => [layout.name, layout]));
const formats = new Map(tables.formats.map((format) => [format.name, withSortedValues(format)]));

// The finite values in ascending order, each with the first code that means it, and the midpoints between them.
function withSortedValues(format) {
  const values = format.values.map((value) => (value === null ? NaN : Number(value)));
  const seen = new Map();
  values.forEach((value, code) => {
    if (Number.isFinite(value) && !seen.has(value)) seen.set(value, code);
  });
  const sorted = [...seen.keys()].sort((a, b) => a - b);
  const codes = sorted.map((value) => seen.get(value));
  const midpoints = sorted.slice(1).map((value, i) => Math.fround(Math.fround(value + sorted[i]) * 0.5));
  return { ...format, values, sorted, codes, midpoints };
}

// ---- IEEE floats wider than 8 bits: their values follow from the widths of their fields ----

function floatValue(layout, code) {
  const { mantissa, bias, bits } = layout;
  const top = 2 ** layout.exponent - 1;
  const sign = code >= 2 ** (bits - 1) ? -1 : 1;
  const exponent = Math.floor(code / 2 ** mantissa) % 2 ** layout.exponent;
  const fraction = code % 2 ** mantissa;
  if (exponent === top) return fraction ? NaN : sign * Infinity;
  if (exponent === 0) return sign * fraction * 2 ** (1 - bias - mantissa);
  return sign * (1 + fraction / 2 ** mantissa) * 2 ** (exponent - bias);
}

function roundHalfEven(x) {
  const low = Math.floor(x);
  const rest = x - low;
  if (rest !== 0.5) return rest < 0.5 ? low : low + 1;
  return low % 2 === 0 ? low : low + 1;
}

// The nearest value of the format, ties to even; beyond the largest, infinity.
function roundToFloat(layout, x) {
  if (x === 0 || !Number.isFinite(x)) return x;
  const magnitude = Math.abs(x);
  let exponent = Math.floor(Math.log2(magnitude));
  if (2 ** exponent > magnitude) exponent -= 1;
  else if (2 ** (exponent + 1) <= magnitude) exponent += 1;
  const quantum = 2 ** (Math.max(exponent, 1 - layout.bias) - layout.mantissa);
  const rounded = roundHalfEven(magnitude / quantum) * quantum;
  const limit = 2 ** (2 ** layout.exponent - 1 - layout.bias);
  return Math.sign(x) * (rounded >= limit ? Infinity : rounded);
}

function floatCode(layout, x) {
  const { mantissa, bias, bits } = layout;
  const sign = x < 0 || Object.is(x, -0) ? 2 ** (bits - 1) : 0;
  const top = (2 ** layout.exponent - 1) * 2 ** mantissa;
  if (Number.isNaN(x)) return top + 2 ** (mantissa - 1);
  const magnitude = Math.abs(roundToFloat(layout, x));
  if (magnitude === Infinity) return sign + top;
  if (magnitude < 2 ** (1 - bias)) return sign + magnitude * 2 ** (bias - 1 + mantissa);
  let exponent = Math.floor(Math.log2(magnitude));
  if (2 ** exponent > magnitude) exponent -= 1;
  else if (2 ** (exponent + 1) <= magnitude) exponent += 1;
  return sign + (exponent + bias) * 2 ** mantissa + (magnitude / 2 ** exponent - 1) * 2 ** mantissa;
}

// ---- formats with a scale ----

// The scale for a group whose largest magnitude is `largest`, as it is stored.
function scaleFor(format, largest) {
  const exact = Math.fround(Math.fround(largest) / format.top);
  return format.scale === "fp16" ? roundToFloat(layouts.get("fp16"), exact) : exact;
}

// The place in format.sorted of the value nearest to t. At a midpoint integers and floats take the even code,
// codebooks the lower entry.
function nearestPlace(format, t) {
  const { midpoints, codes } = format;
  let low = 0;
  let high = midpoints.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (midpoints[middle] < t) low = middle + 1;
    else high = middle;
  }
  const isTie = low < midpoints.length && midpoints[low] === t;
  return isTie && format.grid !== "codebook" && codes[low] % 2 !== 0 ? low + 1 : low;
}

// Where a weight lies on the grid: what is compared with the midpoints.
function onGrid(format, weight, scale) {
  if (scale === 0) return 0;
  if (format.grid !== "codebook") return Math.fround(weight / scale);
  const inverse = Math.fround(1 / Math.max(scale, 1e-38));
  return Math.min(1, Math.max(-1, Math.fround(weight * inverse)));
}

// Weights in groups, each with a scale of its own: what `bitfold.encode` and `decode` make of one row.
function quantize(format, weights, group) {
  const decoded = new Float32Array(weights.length);
  const places = new Int32Array(weights.length);
  const scales = [];
  let error = 0;
  let norm = 0;
  for (let start = 0; start < weights.length; start += group) {
    const stop = Math.min(start + group, weights.length);
    let largest = 0;
    for (let i = start; i < stop; i++) largest = Math.max(largest, Math.abs(weights[i]));
    const scale = scaleFor(format, largest);
    scales.push(scale);
    for (let i = start; i < stop; i++) {
      places[i] = nearestPlace(format, onGrid(format, weights[i], scale));
      decoded[i] = Math.fround(format.sorted[places[i]] * scale);
      error += (decoded[i] - weights[i]) ** 2;
      norm += weights[i] ** 2;
    }
  }
  return { decoded, places, scales, relative: norm > 0 ? Math.sqrt(error / norm) : 0 };
}

// ---- how many values lie in an interval ----

// A number line: count(a, b) values in [a, b), nearest(x), and the grid's largest value.
function floatLine(layout) {
  // Codes in the order of their values, zero once: the place of the smallest value that is at least x.
  const place = (x) => {
    const value = roundToFloat(layout, x);
    const magnitude = floatCode(layout, Math.abs(value));
    const here = value < 0 ? -magnitude : magnitude;
    return value < x ? here + 1 : here;
  };
  return { count: (a, b) => place(b) - place(a), nearest: (x) => roundToFloat(layout, x) };
}

function tableLine(values) {
  const place = (x) => {
    let low = 0;
    let high = values.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (values[middle] < x) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  const nearest = (x) => {
    const right = Math.min(place(x), values.length - 1);
    const left = Math.max(0, right - 1);
    return Math.abs(values[left] - x) <= Math.abs(values[right] - x) ? values[left] : values[right];
  };
  return { count: (a, b) => place(b) - place(a), nearest };
}
