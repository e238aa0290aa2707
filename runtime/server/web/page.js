// The page of `edgeprune serve`: a picture in, a streamed answer out, and what was kept of the picture drawn over it.

const $ = (id) => document.getElementById(id);
const PARTS = [["queue", "waiting"], ["preprocess", "preparing"], ["vision", "vision"], ["select", "selecting"], ["prefill", "prefill"]];
const DROPPED = "rgb(20 22 26 / .74)";
const LINE = "#ffc400";
const KEY = "edgeprune-key";

const state = { card: null, frames: [], camera: null, pictures: [], ask: null };

// The server.

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
}

async function call(path, options = {}) {
  const response = await fetch(path, { ...options, headers: { ...headers(), ...options.headers } });
  if (response.status === 401) {
    await askForKey(sessionStorage.getItem(KEY) !== null);
    return call(path, options);
  }
  if (!response.ok) {
    const told = await response.json().catch(() => ({}));
    throw new Error(told.error?.message ?? `The server answered with status ${response.status}.`);
  }
  return response;
}

let asking = null; // one dialog for all who wait for the key

function askForKey(wrong) {
  asking ??= new Promise((resolve) => {
    $("key-text").textContent = wrong ? "That key is not accepted here." : "It is kept until you close this tab.";
    $("key").value = "";
    $("key-dialog").addEventListener("close", () => {
      sessionStorage.setItem(KEY, $("key").value.trim());
      asking = null;
      resolve();
    }, { once: true });
    $("key-dialog").showModal();
  });
  return asking;
}

async function watchPhase() {
  let phase = "gone";
  try {
    phase = (await (await fetch("/health")).json()).phase;
    if (!state.card && (phase === "ready" || phase === "busy")) {
      await meetModel();
    }
  } catch {
    // it says "not reached" until the server is there again
  }
  $("lamp").className = phase;
  $("phase-text").textContent = phase === "gone" ? "not reached" : phase;
  setTimeout(watchPhase, phase === "loading" || phase === "warming" ? 400 : 2000);
}

async function meetModel() {
  state.card = (await (await call("/v1/models")).json()).data[0];
  const { geometry, tiers, kind, cuts } = state.card.edgeprune;
  $("model").textContent = state.card.id;
  const clip = kind === "video" ? `${geometry.frames} frames of ` : "";
  const plan = cuts.length ? "" : ", nothing pruned";
  $("geometry").textContent = `${clip}${geometry.width} × ${geometry.height} px, ${geometry.visual_tokens} visual tokens${plan}`;
  $("file").multiple = geometry.frames > 1;
  $("budget").hidden = tiers.length < 2;
  $("tier").max = tiers.length; // the best stands on the right, and behind it the choice of the runtime
  $("tier").value = tiers.length;
  showTier();
  $("canvas").width = geometry.width;
  $("canvas").height = geometry.height;
  draw();
  ready();
}

function tier() {
  const { tiers } = state.card.edgeprune;
  return tiers[tiers.length - 1 - Number($("tier").value)];
}

function showTier() {
  const name = tier() ?? "best in time";
  $("tier-name").textContent = name;
  $("tier").setAttribute("aria-valuetext", name);
}

function ready() {
  const live = state.camera !== null && state.frames.length === 0;
  $("camera").setAttribute("aria-pressed", String(state.camera !== null));
  $("camera").textContent = live ? "Camera off" : state.camera ? "Next picture" : "Camera";
  $("ask").disabled = !state.card || state.ask !== null || !(state.frames.length || state.camera);
}

// Pictures.

function framed(source, width, height) {
  // The picture as it is sent: of the very size that the model was prepared for, so that what was kept lies where it is drawn.
  const { geometry } = state.card.edgeprune;
  const frame = new OffscreenCanvas(geometry.width, geometry.height);
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

async function openFiles(files) {
  const { geometry } = state.card.edgeprune;
  const chosen = [...files].slice(0, geometry.frames);
  try {
    if (chosen.length < geometry.frames) {
      throw new Error(`Choose ${geometry.frames} pictures: the frames of a video.`);
    }
    stopCamera();
    state.opened = await Promise.all(chosen.map((file) => createImageBitmap(file)));
    frameOpened();
    fail("");
  } catch (error) {
    fail(error instanceof DOMException ? "That file is no picture that this browser can read." : error.message);
  }
  ready();
}

function frameOpened() {
  state.frames = (state.opened ?? []).map((picture) => framed(picture, picture.width, picture.height));
  showPictures([]);
}

async function startCamera() {
  if (!navigator.mediaDevices) {
    fail("A browser gives the camera only to pages on this machine (localhost) or over https.");
    return;
  }
  try {
    state.camera = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    fail("");
  } catch (error) {
    fail(error.name === "NotAllowedError" ? "The browser does not let this page use the camera." : "There is no camera to be had.");
    return;
  }
  $("video").srcObject = state.camera;
  await $("video").play();
  goLive();
}

function goLive() {
  [state.opened, state.frames] = [null, []];
  showPictures([]);
  follow();
  ready();
}

function stopCamera() {
  state.camera?.getTracks().forEach((track) => track.stop());
  state.camera = null;
  draw();
  ready();
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

async function takeShots() {
  const { geometry } = state.card.edgeprune;
  const shots = [shot()];
  while (shots.length < geometry.frames) {
    await new Promise((resolve) => setTimeout(resolve, 1000 / (geometry.fps || 1)));
    shots.push(shot());
  }
  return shots;
}

// What was kept.

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

function showPictures(pictures) {
  state.pictures = pictures;
  const picture = pictures.at(-1);
  $("kept").hidden = !picture;
  if (picture) {
    const chosen = $("cut").value;
    const options = picture.cuts.map((cut, number) => new Option(cut.cut, number));
    $("cut").replaceChildren(new Option("nothing: the input", ""), ...options);
    const same = [...$("cut").options].some((option) => option.value === chosen);
    $("cut").value = same && chosen !== "" ? chosen : picture.cuts.length - 1;
    const parts = sheets(picture.views);
    $("sheet").hidden = parts.length < 2;
    $("sheet").replaceChildren(...parts.map((_, number) => new Option(`part ${number + 1} of ${parts.length}`, number)));
  }
  draw();
}

function draw() {
  if (!state.card) {
    return;
  }
  const canvas = $("canvas");
  const pen = canvas.getContext("2d");
  const picture = state.pictures.at(-1);
  const parts = picture ? sheets(picture.views) : [];
  const sheet = Number($("sheet").value) || 0;
  const many = state.frames.length;
  const frame = many ? state.frames[parts.length ? Math.floor(sheet * many / parts.length) : 0] : state.camera ? shot() : null;
  $("invitation").hidden = frame !== null;
  const scale = Math.max(1, Math.ceil(900 / state.card.edgeprune.geometry.width));
  canvas.width = state.card.edgeprune.geometry.width * scale;
  canvas.height = state.card.edgeprune.geometry.height * scale;
  if (frame) {
    pen.imageSmoothingQuality = "high";
    pen.drawImage(frame, 0, 0, canvas.width, canvas.height);
  }
  const cut = picture && $("cut").value !== "" ? picture.cuts[Number($("cut").value)] : null;
  if (cut) {
    parts[sheet].forEach((view) => drawView(pen, view, cut.shares, canvas.width / picture.width, canvas.height / picture.height));
  }
  describe(frame, picture, cut);
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

function describe(frame, picture, cut) {
  const all = state.card.edgeprune.geometry.visual_tokens;
  const words = cut ? `${cut.cut} kept ${cut.after} of ${all} visual tokens (${Math.round(100 * cut.after / all)} %)` : `all ${all} visual tokens`;
  $("kept-text").textContent = words.replace(/^.* kept/, "");
  $("canvas").setAttribute("aria-label", frame ? `The picture; ${words}` : "No picture yet");
}

// Asking.

function request(frames) {
  const number = (id) => ($(id).value === "" ? undefined : Number($(id).value));
  const content = frames.map((url) => ({ type: "image_url", image_url: { url } }));
  content.push({ type: "text", text: $("prompt").value });
  return {
    model: state.card.id, messages: [{ role: "user", content }], stream: true, stream_options: { include_usage: true },
    max_tokens: number("tokens"), temperature: number("temperature"), deadline_ms: number("deadline"),
    prune: $("prune").checked, kept: true, tier: tier(),
  };
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

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let held = ""; ;) {
    const { value, done } = await reader.read();
    if (done) {
      return;
    }
    const lines = (held + value).split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith("data: {")) {
        yield JSON.parse(line.slice(6));
      }
    }
  }
}

async function ask() {
  const abort = new AbortController();
  state.ask = abort;
  begin();
  try {
    if (state.frames.length === 0) {
      state.frames = await takeShots();
    }
    const body = JSON.stringify(request(await Promise.all(state.frames.map(dataUrl))));
    const sent = { method: "POST", body, signal: abort.signal, headers: { "content-type": "application/json" } };
    await read(await call("/v1/chat/completions", sent), performance.now());
  } catch (error) {
    if (abort.signal.aborted) {
      $("progress").textContent = "stopped";
    } else {
      fail(error instanceof TypeError ? "The server is not reached." : error.message);
    }
  }
  state.ask = null;
  $("stop").hidden = true;
  $("ask").hidden = false;
  ready();
  if (document.activeElement === document.body) {
    $("ask").focus(); // where the focus was, the button is gone
  }
}

function begin() {
  fail("");
  showPictures([]);
  $("answer").textContent = "";
  $("answer").classList.remove("empty");
  ["per-token", "visual", "kv", "length", "total", "progress"].forEach((id) => { $(id).textContent = ""; });
  showParts({}, 0);
  $("progress").textContent = "asking …";
  $("ask").hidden = true;
  $("stop").hidden = false;
  $("stop").focus();
}

async function read(response) {
  let [pieces, since] = [0, 0];
  for await (const chunk of events(response)) {
    if (chunk.error) {
      throw new Error(chunk.error.message);
    }
    const text = chunk.choices?.[0]?.delta?.content;
    if (text) {
      $("answer").append(text);
      since ||= performance.now();
      if (pieces++) {
        $("per-token").textContent = ms((performance.now() - since) / (pieces - 1));
      }
      $("progress").textContent = "answering …";
    }
    if (chunk.edgeprune) {
      showParts(chunk.edgeprune.times_ms, chunk.edgeprune.queue_ms);
    }
    if (chunk.edgeprune?.finish_reason) {
      finish(chunk.edgeprune, chunk.usage);
    }
  }
}

function finish(receipt, usage) {
  const { before, after } = usage.visual_tokens;
  $("per-token").textContent = receipt.times_ms.per_token ? ms(receipt.times_ms.per_token) : "–";
  $("visual").textContent = before ? `${before} → ${after}` : "–";
  $("kv").textContent = `${(receipt.kv_bytes / 1024).toLocaleString("en", { maximumFractionDigits: 0 })} KiB`;
  $("length").textContent = `${receipt.generated_tokens} tokens`;
  const why = { end: "done", stop: "done", length: "cut at the longest answer", deadline: "cut at the deadline", kv_limit: "cut: memory is full" };
  const budget = receipt.tier ? `; budget ${receipt.tier}` : "";
  const reused = receipt.reused?.length ? `; reused: ${receipt.reused.join(", ")}` : "";
  $("progress").textContent = (why[receipt.finish_reason] ?? receipt.finish_reason) + budget + reused;
  showPictures(receipt.pictures ?? []);
}

function showParts(times, queue) {
  const all = { ...times, queue };
  const shown = PARTS.filter(([name]) => all[name] !== undefined);
  const bars = shown.map(([name]) => {
    const bar = document.createElement("i");
    bar.className = `part-${PARTS.findIndex((part) => part[0] === name) + 1}`;
    bar.style.flexGrow = 1000 * all[name]; // below 1 in all, they would not fill the bar
    return bar;
  });
  const items = shown.map(([name, label], number) => {
    const [item, mark, value] = ["li", "i", "b"].map((tag) => document.createElement(tag));
    mark.className = bars[number].className;
    value.textContent = ms(all[name]);
    item.append(mark, `${label} `, value);
    return item;
  });
  const known = shown.length > 1;
  $("parts").replaceChildren(...(known ? bars : []));
  $("legend").replaceChildren(...(known ? items : []));
  $("total").textContent = known ? `first token after ${ms(shown.reduce((sum, [name]) => sum + all[name], 0))}` : "";
}

function ms(value) {
  return value === 0 ? "0 ms" : value >= 1000 ? `${(value / 1000).toFixed(2)} s` : `${value.toFixed(value < 10 ? 1 : 0)} ms`;
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
  if (message) {
    $("progress").textContent = "";
  }
}

// Controls.

$("camera").addEventListener("click", () => {
  if (state.card && state.ask === null) {
    (state.camera === null ? startCamera : state.frames.length ? goLive : stopCamera)();
  }
});
$("choose").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => state.card && $("file").files.length && openFiles($("file").files));
$("crop").addEventListener("change", () => state.card && (state.opened ? frameOpened() : draw()));
$("tier").addEventListener("input", showTier);
$("cut").addEventListener("change", draw);
$("sheet").addEventListener("change", draw);
$("stop").addEventListener("click", () => state.ask?.abort());
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!$("ask").disabled) {
    ask();
  }
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]]) {
  $("stage").addEventListener(name, (event) => {
    event.preventDefault();
    $("stage").classList.toggle("over", over);
    if (name === "drop" && state.card && event.dataTransfer.files.length) {
      openFiles(event.dataTransfer.files);
    }
  });
}
$("answer").textContent = "The answer will stand here.";
$("answer").classList.add("empty");
watchPhase();
