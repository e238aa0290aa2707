// The picture: from a file, a sample or the camera, in the size that the model takes, and what was kept drawn over it.

const DROPPED = "rgb(20 22 26 / .74)";
const LINE = "#ffc400";
const SHAPE_TOLERANCE = 0.01; // a difference of shape below it leaves no bars that anyone sees
const $ = (id) => document.getElementById(id);

// `frames`: the picture as it is sent, of a video all its frames. `opened`: its source. `camera`: a stream. `kept`: maps of the answer.
const state = { geometry: null, frames: [], opened: null, camera: null, kept: [] };
let changed = () => {};

export function begin(geometry, onChange) {
  [state.geometry, changed] = [geometry, onChange];
  $("file").multiple = geometry.frames > 1;
  $("canvas").width = geometry.width;
  $("canvas").height = geometry.height;
  draw();
}

export const isThere = () => state.frames.length > 0 || state.camera !== null;

// Where it comes from.

export async function open(sources) {
  // `sources`: blobs. Throws an Error with a message for people.
  const chosen = [...sources].slice(0, state.geometry.frames);
  if (chosen.length < state.geometry.frames) {
    throw new Error(`Choose ${state.geometry.frames} pictures: the frames of a video.`);
  }
  const opened = await Promise.all(chosen.map((file) => createImageBitmap(file))).catch(() => {
    throw new Error("This browser cannot read that file as a picture.");
  });
  stopCamera();
  state.opened = opened;
  frameOpened();
}

function frameOpened() {
  state.frames = (state.opened ?? []).map((picture) => framed(picture, picture.width, picture.height));
  showKept([]);
  showCrop();
  changed();
}

function framed(source, width, height) {
  // As it is sent: of the very size that the model was prepared for, so that what was kept lies where it is drawn.
  const frame = new OffscreenCanvas(state.geometry.width, state.geometry.height);
  const pen = frame.getContext("2d");
  const choose = $("crop").checked ? Math.max : Math.min;
  const scale = choose(frame.width / width, frame.height / height);
  const [across, down] = [width * scale, height * scale];
  pen.fillStyle = "#808080";
  pen.fillRect(0, 0, frame.width, frame.height);
  pen.imageSmoothingQuality = "high";
  pen.drawImage(source, (frame.width - across) / 2, (frame.height - down) / 2, across, down);
  return frame;
}

function showCrop() {
  // The choice makes a difference only where the picture has another shape than the model's.
  const shape = state.geometry.width / state.geometry.height;
  const shapes = state.camera ? [shot.shape()] : (state.opened ?? []).map((picture) => picture.width / picture.height);
  $("crop-row").hidden = !shapes.some((each) => Math.abs(each / shape - 1) > SHAPE_TOLERANCE);
}

export async function pressCamera() {
  // The button: on, off, or, once a picture stands, the next one.
  if (state.camera === null) {
    await startCamera();
  } else if (state.frames.length) {
    goLive();
  } else {
    stopCamera();
  }
}

async function startCamera() {
  if (!navigator.mediaDevices) {
    throw new Error("A browser gives the camera only to pages on this machine (localhost) or over https.");
  }
  try {
    state.camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
  } catch (error) {
    throw new Error(error.name === "NotAllowedError" ? "The browser does not let this page use the camera." : "No camera was found.");
  }
  $("video").srcObject = state.camera;
  await $("video").play();
  goLive();
}

function goLive() {
  [state.opened, state.frames] = [null, []];
  showKept([]);
  showCrop();
  follow();
  changed();
}

function stopCamera() {
  state.camera?.getTracks().forEach((track) => track.stop());
  state.camera = null;
  showCrop();
  draw();
  changed();
}

function follow() {
  // The camera's picture moves until it is asked about; then it stands, for more questions, until the button is pressed again.
  if (state.camera && state.frames.length === 0) {
    draw();
    requestAnimationFrame(follow);
  }
}

function shot() {
  const video = $("video");
  return framed(video, video.videoWidth || 1, video.videoHeight || 1);
}
shot.shape = () => ($("video").videoWidth || 1) / ($("video").videoHeight || 1);

export function nameCamera() {
  const live = state.camera !== null && state.frames.length === 0;
  $("camera").setAttribute("aria-pressed", String(state.camera !== null));
  $("camera").textContent = live ? "Camera off" : state.camera ? "Next picture" : "Camera";
}

export async function urls() {
  // The frames as data URLs. A camera's are taken now.
  if (state.frames.length === 0) {
    const shots = [shot()];
    while (shots.length < state.geometry.frames) {
      await new Promise((resolve) => setTimeout(resolve, 1000 / (state.geometry.fps || 1)));
      shots.push(shot());
    }
    state.frames = shots;
  }
  return Promise.all(state.frames.map(dataUrl));
}

async function dataUrl(frame) {
  const blob = await frame.convertToBlob({ type: "image/png" });
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// What was kept of it.

function sheets(views) {
  // Views that overlap (tiles and their overview, frames of a video) go onto sheets of their own.
  const overlap = (a, b) => a.top < b.top + b.height && b.top < a.top + a.height && a.left < b.left + b.width && b.left < a.left + a.width;
  const found = [];
  let begin = 0;
  for (const view of views) {
    const placed = { ...view, begin };
    begin += view.rows * (view.columns + view.separators);
    if (found.length && !found.at(-1).some((other) => overlap(view, other))) {
      found.at(-1).push(placed);
    } else {
      found.push([placed]);
    }
  }
  return found;
}

export function showKept(kept) {
  state.kept = kept;
  const picture = kept.at(-1);
  $("kept").hidden = !picture;
  if (picture) {
    const chosen = $("cut").value;
    const options = picture.cuts.map((cut, number) => new Option(`kept by ${cut.cut}`, number));
    $("cut").replaceChildren(new Option("the whole picture", ""), ...options);
    const same = [...$("cut").options].some((option) => option.value === chosen);
    $("cut").value = same && chosen !== "" ? chosen : picture.cuts.length - 1;
    const parts = sheets(picture.views);
    $("sheet").hidden = parts.length < 2;
    $("sheet").replaceChildren(...parts.map((_, number) => new Option(`part ${number + 1} of ${parts.length}`, number)));
  }
  draw();
}

function draw() {
  if (!state.geometry) {
    return;
  }
  const canvas = $("canvas");
  const pen = canvas.getContext("2d");
  const picture = state.kept.at(-1);
  const parts = picture ? sheets(picture.views) : [];
  const sheet = Number($("sheet").value) || 0;
  const many = state.frames.length;
  const frame = many ? state.frames[parts.length ? Math.floor(sheet * many / parts.length) : 0] : state.camera ? shot() : null;
  $("invitation").hidden = frame !== null;
  const scale = Math.max(1, Math.ceil(900 / state.geometry.width));
  canvas.width = state.geometry.width * scale;
  canvas.height = state.geometry.height * scale;
  if (frame) {
    pen.imageSmoothingQuality = "high";
    pen.drawImage(frame, 0, 0, canvas.width, canvas.height);
  }
  const cut = picture && $("cut").value !== "" ? picture.cuts[Number($("cut").value)] : null;
  if (cut) {
    parts[sheet].forEach((view) => drawView(pen, view, cut.shares, canvas.width / picture.width, canvas.height / picture.height));
  }
  describe(frame, cut);
}

function drawView(pen, view, shares, across, down) {
  const [width, height] = [view.width * across / view.columns, view.height * down / view.rows];
  const [left, top] = [(column) => Math.round(view.left * across + column * width), (row) => Math.round(view.top * down + row * height)];
  const share = (row, column) => row < 0 || column < 0 || row >= view.rows || column >= view.columns
    ? 0 : shares[view.begin + row * (view.columns + view.separators) + column];
  pen.fillStyle = DROPPED;
  pen.strokeStyle = LINE;
  pen.lineWidth = Math.max(2, pen.canvas.width / 400);
  pen.beginPath();
  for (let row = 0; row < view.rows; row++) {
    for (let column = 0; column < view.columns; column++) {
      const [x, y, right, bottom, held] = [left(column), top(row), left(column + 1), top(row + 1), share(row, column)];
      pen.globalAlpha = 1 - held;
      pen.fillRect(x, y, right - x, bottom - y);
      if (held === 1) {
        edge(share(row - 1, column), x, y, right, y);
        edge(share(row + 1, column), x, bottom, right, bottom);
        edge(share(row, column - 1), x, y, x, bottom);
        edge(share(row, column + 1), right, y, right, bottom);
      }
    }
  }
  pen.globalAlpha = 1;
  pen.stroke();

  function edge(beyond, ...line) {
    if (beyond < 1) {
      pen.moveTo(line[0], line[1]);
      pen.lineTo(line[2], line[3]);
    }
  }
}

function describe(frame, cut) {
  const all = state.geometry.visual_tokens;
  const amount = cut ? `${cut.after} of ${all} visual tokens (${Math.round(100 * cut.after / all)} %)` : `all ${all} visual tokens`;
  const partly = cut?.shares.some((share) => share > 0 && share < 1); // each layer and KV head keeps its own
  $("kept-text").textContent = amount + (partly ? "; the brighter, the more caches keep it" : cut ? "; the rest is dark" : "");
  $("canvas").setAttribute("aria-label", frame ? `The picture; ${cut ? `${cut.cut} kept ` : ""}${amount}` : "No picture yet");
}

$("cut").addEventListener("change", draw);
$("sheet").addEventListener("change", draw);
$("crop").addEventListener("change", () => state.geometry && (state.opened ? frameOpened() : draw()));
