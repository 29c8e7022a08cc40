-- Wireshark's view of VMBus: channel messages (protocol "vmbus") and what is published in rings ("vmbus_ring").
--
-- Captures are made by `vmbus-emu trace RECORDING --to pcapng`. Each frame is an exported PDU that names one of the
-- two dissectors, so no preference has to be set. Names of fields are the kernel's (include/linux/hyperv.h);
-- messages that Linux does not know have OpenVMM's. Bytes are little-endian.
--
-- Install: `vmbus-emu wireshark install`, or tshark -X lua_script:$(vmbus-emu wireshark show)

local OFFERCHANNEL = 1
local HEADER_BYTES = 8
local DESCRIPTOR_BYTES = 16
local TRAILER_BYTES = 8
local PAGE_BYTES = 4096
local WIN10_V5 = 0x00050000
local COPPER = 0x00060000
local CLIENT_ID = 0x8
local SERVER_MONITOR_PAGES = 0x40

local MSGTYPES = {
  [0] = "INVALID", "OFFERCHANNEL", "RESCIND_CHANNELOFFER", "REQUESTOFFERS", "ALLOFFERS_DELIVERED", "OPENCHANNEL",
  "OPENCHANNEL_RESULT", "CLOSECHANNEL", "GPADL_HEADER", "GPADL_BODY", "GPADL_CREATED", "GPADL_TEARDOWN",
  "GPADL_TORNDOWN", "RELID_RELEASED", "INITIATE_CONTACT", "VERSION_RESPONSE", "UNLOAD", "UNLOAD_RESPONSE",
  "OPEN_RESERVED_CHANNEL", "CLOSE_RESERVED_CHANNEL", "CLOSE_RESERVED_RESPONSE", "TL_CONNECT_REQUEST",
  "MODIFYCHANNEL", "TL_CONNECT_RESULT", "MODIFYCHANNEL_RESPONSE", "MODIFY_CONNECTION",
  "MODIFY_CONNECTION_RESPONSE", "PAUSE", "PAUSE_RESPONSE", "RESUME",
}
local STATUSES = {
  [0] = "SUCCESS", [0x8000FFFF] = "UNSUCCESSFUL", [0xC0000236] = "CONNECTION_REFUSED",
}
local CONNECTION_STATES = { [0] = "SUCCESSFUL", "FAILED_LOW_RESOURCES", "FAILED_UNKNOWN_FAILURE" }
local VERSIONS = {
  [0x0000000D] = "0.13 (WS2008)", [0x00010001] = "1.1 (Win7)", [0x00020004] = "2.4 (Win8)",
  [0x00030000] = "3.0 (Win8.1)", [0x00040000] = "4.0 (Win10)", [0x00040001] = "4.1", [0x00050000] = "5.0",
  [0x00050001] = "5.1", [0x00050002] = "5.2 (WS2019)", [0x00050003] = "5.3 (WS2022)", [0x00060000] = "6.0 (Copper)",
}
local PIPE_MODES = { [0] = "BYTE", [4] = "MESSAGE" }
local PACKET_TYPES = {
  [0] = "INVALID", "SYNCH", "ADD_XFER_PAGESET", "RM_XFER_PAGESET", "ESTABLISH_GPADL", "TEARDOWN_GPADL",
  "DATA_INBAND", "DATA_USING_XFER_PAGES", "DATA_USING_GPADL", "DATA_USING_GPA_DIRECT", "CANCEL_REQUEST", "COMP",
  "DATA_USING_ADDITIONAL_PKT", "ADDITIONAL_DATA",
}
local USING_XFER_PAGES, USING_GPA_DIRECT = 7, 9

-- Classes of devices, by the GUID of an offer as Wireshark writes it.
local DEVICES = {
  ["32412632-86cb-44a2-9b5c-50d1417354f5"] = "ide", ["ba6163d9-04a1-4d29-b605-72e2ffb1dc7f"] = "scsi",
  ["2f9bcc4a-0069-4af3-b76b-6fd0be528cda"] = "fc", ["f8615163-df3e-46c5-913f-f2d2f965ed0e"] = "nic",
  ["8c2eaf3d-32a7-4b09-ab99-bd1f1c86b501"] = "nd", ["44c4f61d-4444-4400-9d52-802e27ede19f"] = "pcie",
  ["da0a7802-e377-4aac-8e77-0558eb1073f8"] = "fb", ["f912ad6d-2b17-48ea-bd65-f927a61c7684"] = "kbd",
  ["cfa8b69e-5b4a-4cc0-b98b-8ba1a1f3f95a"] = "mouse", ["a9a0f4e7-5a45-4d96-b827-8a841e8c03e6"] = "kvp",
  ["9527e630-d0ae-497b-adce-e80ab0175caf"] = "ts", ["57164f39-9115-4e78-ab55-382f3bd5422d"] = "hb",
  ["0e0b6031-5213-4934-818b-38d90ced39db"] = "shutdown", ["34d14be3-dee4-41c8-9ae7-6b174977c192"] = "fcopy",
  ["35fa2e29-ea23-4236-96ae-3a6ebacba440"] = "backup", ["525074dc-8985-46e2-8057-a307dc18a502"] = "dm",
}

-- pinfo does not tell the direction; the frame's flags do: 1 is inbound (to the guest), 2 outbound.
local frame_direction = Field.new("frame.packet_flags_direction")
local interface_name = Field.new("frame.interface_name")

local function set_ends(pinfo)
  local direction = frame_direction()
  if direction then
    local inbound = direction.value == 1
    pinfo.cols.src = inbound and "host" or "guest"
    pinfo.cols.dst = inbound and "guest" or "host"
  end
end

-- ---------------------------------------------------------------------------------------------------------------
-- Channel messages
-- ---------------------------------------------------------------------------------------------------------------

local vmbus = Proto("vmbus", "Hyper-V VMBus channel message")
local F = {}

local function field(make, name, title, ...)
  F[name] = make("vmbus." .. name, title, ...)
end
local function u8(name, base_, names) field(ProtoField.uint8, name, name, base_ or base.DEC, names) end
local function u16(name, base_, names) field(ProtoField.uint16, name, name, base_ or base.DEC, names) end
local function u32(name, base_, names) field(ProtoField.uint32, name, name, base_ or base.DEC, names) end
local function u64(name, base_) field(ProtoField.uint64, name, name, base_ or base.HEX) end

u32("msgtype", base.DEC, MSGTYPES)
u32("padding")
field(ProtoField.guid, "if_type", "if_type")
field(ProtoField.guid, "if_instance", "if_instance")
u16("chn_flags", base.HEX)
for mask, name in pairs({
  [0x0001] = "enumerate_device_interface", [0x0002] = "server_supports_transfer_pages",
  [0x0004] = "server_supports_gpadls", [0x0008] = "require_pinned_external_memory", [0x0010] = "named_pipe_mode",
  [0x0100] = "loopback_offer", [0x0200] = "parent_offer", [0x0400] = "request_monitored_notification",
  [0x2000] = "tlnpi_provider_offer",
}) do
  field(ProtoField.bool, "chn_flags." .. name, name, 16, nil, mask)
end
local CHN_FLAGS = {
  "enumerate_device_interface", "server_supports_transfer_pages", "server_supports_gpadls",
  "require_pinned_external_memory", "named_pipe_mode", "loopback_offer", "parent_offer",
  "request_monitored_notification", "tlnpi_provider_offer",
}
u16("mmio_megabytes")
field(ProtoField.bytes, "user_def", "user_def")
u32("pipe_mode", base.DEC, PIPE_MODES)
u16("sub_channel_index")
u16("mmio_megabytes_optional")
u32("child_relid")
u8("monitorid")
field(ProtoField.bool, "monitor_allocated", "monitor_allocated", 8, nil, 0x1)
field(ProtoField.bool, "is_dedicated_interrupt", "is_dedicated_interrupt", 16, nil, 0x1)
u32("connection_id", base.HEX)
u32("openid")
u32("ringbuffer_gpadlhandle", base.HEX)
u32("target_vp")
u32("downstream_ringbuffer_pageoffset")
field(ProtoField.bytes, "userdata", "userdata")
u16("event_flag")
u16("flags", base.HEX)
u32("status", base.HEX, STATUSES)
u32("gpadl", base.HEX)
u16("range_buflen")
u16("rangecount")
field(ProtoField.bytes, "ranges", "ranges")
u32("byte_count")
u32("byte_offset")
u64("pfn")
u32("msgnumber")
u32("creation_status", base.HEX, STATUSES)
u32("vmbus_version_requested", base.HEX, VERSIONS)
u32("target_vcpu")
u64("interrupt_page")
u8("msg_sint")
u8("msg_vtl")
u32("feature_flags", base.HEX)
u64("monitor_page1")
u64("monitor_page2")
field(ProtoField.guid, "client_id", "client_id")
u8("version_supported")
u8("connection_state", base.DEC, CONNECTION_STATES)
u32("msg_conn_id", base.HEX)
u32("supported_features", base.HEX)
u64("parent_to_child_monitor_page_gpa")
u64("child_to_parent_monitor_page_gpa")
u32("target_sint")
field(ProtoField.guid, "guest_endpoint_id", "guest_endpoint_id")
field(ProtoField.guid, "host_service_id", "host_service_id")
field(ProtoField.guid, "silo_id", "silo_id")
field(ProtoField.bytes, "trailing", "trailing")

local too_short = ProtoExpert.new("vmbus.too_short", "The message is shorter than its type", expert.group.MALFORMED, expert.severity.ERROR)
local not_captured = ProtoExpert.new("vmbus.not_captured", "Not captured: record with --record-bytes", expert.group.UNDECODED, expert.severity.NOTE)
local unknown_type = ProtoExpert.new("vmbus.unknown_type", "No message has this type", expert.group.PROTOCOL, expert.severity.WARN)

vmbus.fields = F
vmbus.experts = { too_short, not_captured, unknown_type }

-- Fixed fields of each message: offset in the message, bytes, name.
local LAYOUTS = {
  [1] = {
    { 8, 16, "if_type" }, { 24, 16, "if_instance" }, { 56, 2, "chn_flags" }, { 58, 2, "mmio_megabytes" },
    { 60, 120, "user_def" }, { 180, 2, "sub_channel_index" }, { 182, 2, "mmio_megabytes_optional" },
    { 184, 4, "child_relid" }, { 188, 1, "monitorid" }, { 189, 1, "monitor_allocated" },
    { 190, 2, "is_dedicated_interrupt" }, { 192, 4, "connection_id" },
  },
  [2] = { { 8, 4, "child_relid" } },
  [3] = {},
  [4] = {},
  [5] = {
    { 8, 4, "child_relid" }, { 12, 4, "openid" }, { 16, 4, "ringbuffer_gpadlhandle" }, { 20, 4, "target_vp" },
    { 24, 4, "downstream_ringbuffer_pageoffset" }, { 28, 120, "userdata" },
  },
  [6] = { { 8, 4, "child_relid" }, { 12, 4, "openid" }, { 16, 4, "status" } },
  [7] = { { 8, 4, "child_relid" } },
  [8] = { { 8, 4, "child_relid" }, { 12, 4, "gpadl" }, { 16, 2, "range_buflen" }, { 18, 2, "rangecount" } },
  [9] = { { 8, 4, "msgnumber" }, { 12, 4, "gpadl" } },
  [10] = { { 8, 4, "child_relid" }, { 12, 4, "gpadl" }, { 16, 4, "creation_status" } },
  [11] = { { 8, 4, "child_relid" }, { 12, 4, "gpadl" } },
  [12] = { { 8, 4, "gpadl" } },
  [13] = { { 8, 4, "child_relid" } },
  [14] = {
    { 8, 4, "vmbus_version_requested" }, { 12, 4, "target_vcpu" }, { 24, 8, "monitor_page1" },
    { 32, 8, "monitor_page2" },
  },
  [15] = { { 8, 1, "version_supported" }, { 9, 1, "connection_state" }, { 12, 4, "msg_conn_id" } },
  [16] = {},
  [17] = {},
  [18] = {
    { 8, 4, "child_relid" }, { 12, 4, "target_vp" }, { 16, 4, "target_sint" }, { 20, 4, "ringbuffer_gpadlhandle" },
    { 24, 4, "downstream_ringbuffer_pageoffset" },
  },
  [19] = { { 8, 4, "child_relid" }, { 12, 4, "target_vp" }, { 16, 4, "target_sint" } },
  [20] = { { 8, 4, "child_relid" } },
  [21] = { { 8, 16, "guest_endpoint_id" }, { 24, 16, "host_service_id" } },
  [22] = { { 8, 4, "child_relid" }, { 12, 4, "target_vp" } },
  [23] = { { 8, 16, "guest_endpoint_id" }, { 24, 16, "host_service_id" }, { 40, 4, "status" } },
  [24] = { { 8, 4, "child_relid" }, { 12, 4, "status" } },
  [25] = { { 8, 8, "parent_to_child_monitor_page_gpa" }, { 16, 8, "child_to_parent_monitor_page_gpa" } },
  [26] = { { 8, 1, "connection_state" } },
  [27] = {},
  [28] = {},
  [29] = {},
}

-- What a message's line in the list says besides its name.
local SUMMARY = { "child_relid", "gpadl", "status", "creation_status", "vmbus_version_requested", "version_supported" }

-- A GUID as text: three little-endian numbers, then bytes as they stand.
local function guid_text(tvb)
  local tail = tvb(10, 6):bytes():tohex(true)
  return string.format("%08x-%04x-%04x-%04x-%s", tvb(0, 4):le_uint(), tvb(4, 2):le_uint(), tvb(6, 2):le_uint(), tvb(8, 2):uint(), tail)
end

local function add(tree, tvb, at, size, name)
  return tree:add_le(F[name], tvb(at, size))
end

-- What follows the fixed fields, by type; each returns where it ended.
local TAILS = {}

TAILS[1] = function(tvb, tree)
  local flags = tvb(56, 2):le_uint()
  if flags % 0x20 >= 0x10 then add(tree, tvb, 60, 4, "pipe_mode") end
  return 196
end

TAILS[5] = function(tvb, tree)
  if tvb:len() < 156 then return 148 end
  add(tree, tvb, 148, 4, "connection_id")
  add(tree, tvb, 152, 2, "event_flag")
  add(tree, tvb, 154, 2, "flags")
  return 156
end

-- Page numbers up to the end of the message, or as many as a range of so many bytes touches.
local function add_pfns(tvb, tree, at, most)
  while at + 8 <= tvb:len() and most > 0 do
    add(tree, tvb, at, 8, "pfn")
    at, most = at + 8, most - 1
  end
  return at
end

TAILS[8] = function(tvb, tree)
  -- Ranges of one GPADL are one stream of bytes, cut anywhere: only where there is one is it known what is what.
  if tvb(18, 2):le_uint() ~= 1 or tvb:len() < 28 then
    if tvb:len() > 20 then add(tree, tvb, 20, tvb:len() - 20, "ranges") end
    return tvb:len()
  end
  add(tree, tvb, 20, 4, "byte_count")
  add(tree, tvb, 24, 4, "byte_offset")
  local bytes = tvb(20, 4):le_uint() + tvb(24, 4):le_uint()
  return add_pfns(tvb, tree, 28, math.floor((bytes + PAGE_BYTES - 1) / PAGE_BYTES))
end

TAILS[9] = function(tvb, tree)
  return add_pfns(tvb, tree, 16, 28)
end

TAILS[14] = function(tvb, tree)
  if tvb(8, 4):le_uint() < WIN10_V5 then
    add(tree, tvb, 16, 8, "interrupt_page")
    return 40
  end
  add(tree, tvb, 16, 1, "msg_sint")
  add(tree, tvb, 17, 1, "msg_vtl")
  add(tree, tvb, 20, 4, "feature_flags")
  local flags = tvb(20, 4):le_uint()
  if tvb(8, 4):le_uint() >= COPPER and flags % (2 * CLIENT_ID) >= CLIENT_ID and tvb:len() >= 56 then
    add(tree, tvb, 40, 16, "client_id")
    return 56
  end
  return 40
end

TAILS[15] = function(tvb, tree)
  if tvb:len() < 20 then return 16 end
  add(tree, tvb, 16, 4, "supported_features")
  local features = tvb(16, 4):le_uint()
  if features % (2 * SERVER_MONITOR_PAGES) < SERVER_MONITOR_PAGES or tvb:len() < 40 then return 20 end
  add(tree, tvb, 24, 8, "parent_to_child_monitor_page_gpa")
  add(tree, tvb, 32, 8, "child_to_parent_monitor_page_gpa")
  return 40
end

TAILS[21] = function(tvb, tree)
  if tvb:len() < 56 then return 40 end
  add(tree, tvb, 40, 16, "silo_id")
  return 56
end

-- The bytes that the fixed fields of a type need.
local function least_size(layout)
  local size = HEADER_BYTES
  for _, entry in ipairs(layout) do size = math.max(size, entry[1] + entry[2]) end
  return size
end

local function summarize(tvb, layout)
  local words = {}
  for _, entry in ipairs(layout) do
    for _, name in ipairs(SUMMARY) do
      if entry[3] == name then
        local value = tvb(entry[1], entry[2]):le_uint()
        local shown = name == "child_relid" and tostring(value) or string.format("0x%x", value)
        if name == "vmbus_version_requested" then shown = VERSIONS[value] or shown end
        if name == "version_supported" then shown = tostring(value) end
        words[#words + 1] = name .. " " .. shown
      end
    end
  end
  return table.concat(words, ", ")
end

function vmbus.dissector(tvb, pinfo, tree)
  pinfo.cols.protocol = "VMBus"
  set_ends(pinfo)
  local branch = tree:add(vmbus, tvb())
  if tvb:len() < HEADER_BYTES then
    branch:add_proto_expert_info(tvb:reported_len() > tvb:len() and not_captured or too_short)
    pinfo.cols.info = "channel message"
    return tvb:len()
  end
  add(branch, tvb, 0, 4, "msgtype")
  add(branch, tvb, 4, 4, "padding")
  local msgtype = tvb(0, 4):le_uint()
  local name, layout = MSGTYPES[msgtype], LAYOUTS[msgtype]
  pinfo.cols.info = name or ("msgtype " .. msgtype)
  branch:append_text(", " .. (name or ("msgtype " .. msgtype)))
  if not layout then
    branch:add_proto_expert_info(unknown_type)
    return tvb:len()
  end
  if tvb:len() < least_size(layout) then
    branch:add_proto_expert_info(tvb:reported_len() > tvb:len() and not_captured or too_short)
    return tvb:len()
  end
  local device
  for _, entry in ipairs(layout) do
    local item = add(branch, tvb, entry[1], entry[2], entry[3])
    if entry[3] == "chn_flags" then
      for _, flag in ipairs(CHN_FLAGS) do item:add_le(F["chn_flags." .. flag], tvb(entry[1], entry[2])) end
    elseif entry[3] == "if_type" then
      device = DEVICES[guid_text(tvb(entry[1], 16))]
      if device then item:append_text(" (" .. device .. ")") end
    end
  end
  local tail = TAILS[msgtype]
  local at = tail and tail(tvb, branch) or least_size(layout)
  -- Firmware guests always post 240 bytes.
  if at < tvb:len() then add(branch, tvb, at, tvb:len() - at, "trailing") end
  local words = summarize(tvb, layout)
  if msgtype == OFFERCHANNEL and device then words = device .. ", " .. words end
  if words ~= "" then
    pinfo.cols.info:append(" " .. words)
    branch:append_text(", " .. words)
  end
  return tvb:len()
end

-- ---------------------------------------------------------------------------------------------------------------
-- Rings
-- ---------------------------------------------------------------------------------------------------------------

local ring = Proto("vmbus_ring", "Hyper-V VMBus ring packets")
local R = {
  relid = ProtoField.uint32("vmbus_ring.relid", "relid"),
  packet = ProtoField.none("vmbus_ring.packet", "Packet"),
  type = ProtoField.uint16("vmbus_ring.type", "type", base.DEC, PACKET_TYPES),
  offset8 = ProtoField.uint16("vmbus_ring.offset8", "offset8"),
  len8 = ProtoField.uint16("vmbus_ring.len8", "len8"),
  flags = ProtoField.uint16("vmbus_ring.flags", "flags", base.HEX),
  completion_requested = ProtoField.bool("vmbus_ring.flags.completion_requested", "completion_requested", 16, nil, 0x1),
  trans_id = ProtoField.uint64("vmbus_ring.trans_id", "trans_id", base.HEX),
  range_cnt = ProtoField.uint32("vmbus_ring.range_cnt", "range_cnt"),
  byte_count = ProtoField.uint32("vmbus_ring.byte_count", "byte_count"),
  byte_offset = ProtoField.uint32("vmbus_ring.byte_offset", "byte_offset"),
  pfn = ProtoField.uint64("vmbus_ring.pfn", "pfn", base.HEX),
  xfer_pageset_id = ProtoField.uint16("vmbus_ring.xfer_pageset_id", "xfer_pageset_id", base.HEX),
  sender_owns_set = ProtoField.uint8("vmbus_ring.sender_owns_set", "sender_owns_set"),
  payload = ProtoField.bytes("vmbus_ring.payload", "payload"),
  trailer = ProtoField.uint32("vmbus_ring.trailer", "trailer: write index before the packet"),
}
local bad_descriptor = ProtoExpert.new("vmbus_ring.bad_descriptor", "No honest peer writes this descriptor", expert.group.MALFORMED, expert.severity.ERROR)
local cut = ProtoExpert.new("vmbus_ring.cut", "The rest was published, but not captured", expert.group.UNDECODED, expert.severity.NOTE)
ring.fields = R
ring.experts = { bad_descriptor, cut }

local function add_gpa_direct(tvb, tree, at, stop)
  if at + 8 > stop then return end
  tree:add_le(R.range_cnt, tvb(at + 4, 4))
  local ranges = tvb(at + 4, 4):le_uint()
  at = at + 8
  while ranges > 0 and at + 8 <= stop do
    tree:add_le(R.byte_count, tvb(at, 4))
    tree:add_le(R.byte_offset, tvb(at + 4, 4))
    local bytes = tvb(at, 4):le_uint() + tvb(at + 4, 4):le_uint()
    local pages = math.floor((bytes + PAGE_BYTES - 1) / PAGE_BYTES)
    at, ranges = at + 8, ranges - 1
    while pages > 0 and at + 8 <= stop do
      tree:add_le(R.pfn, tvb(at, 8))
      at, pages = at + 8, pages - 1
    end
  end
end

local function add_xfer_pages(tvb, tree, at, stop)
  if at + 8 > stop then return end
  tree:add_le(R.xfer_pageset_id, tvb(at, 2))
  tree:add_le(R.sender_owns_set, tvb(at + 2, 1))
  tree:add_le(R.range_cnt, tvb(at + 4, 4))
  local ranges = tvb(at + 4, 4):le_uint()
  at = at + 8
  while ranges > 0 and at + 8 <= stop do
    tree:add_le(R.byte_count, tvb(at, 4))
    tree:add_le(R.byte_offset, tvb(at + 4, 4))
    at, ranges = at + 8, ranges - 1
  end
end

-- One packet that begins at `at`; where the next one begins, or nil when this one cannot be followed.
local function add_packet(tvb, branch, at)
  local kind, offset, length = tvb(at, 2):le_uint(), tvb(at + 2, 2):le_uint() * 8, tvb(at + 4, 2):le_uint() * 8
  local captured = tvb:len()
  local stop = math.min(captured, at + length)
  local name = PACKET_TYPES[kind] or ("type " .. kind)
  local size = math.min(captured, at + length + TRAILER_BYTES) - at
  local item = branch:add(R.packet, tvb(at, math.max(size, DESCRIPTOR_BYTES)))
  item:set_text(string.format("Packet %s, %d bytes, trans_id 0x%s", name, length, tvb(at + 8, 8):le_uint64():tohex(1)))
  item:add_le(R.type, tvb(at, 2))
  item:add_le(R.offset8, tvb(at + 2, 2))
  item:add_le(R.len8, tvb(at + 4, 2))
  item:add_le(R.flags, tvb(at + 6, 2)):add_le(R.completion_requested, tvb(at + 6, 2))
  item:add_le(R.trans_id, tvb(at + 8, 8))
  if offset < DESCRIPTOR_BYTES or offset > length then
    item:add_proto_expert_info(bad_descriptor)
    return nil, name
  end
  local body = math.min(at + offset, captured)
  if kind == USING_GPA_DIRECT then
    add_gpa_direct(tvb, item, at + DESCRIPTOR_BYTES, body)
  elseif kind == USING_XFER_PAGES then
    add_xfer_pages(tvb, item, at + DESCRIPTOR_BYTES, body)
  end
  if stop > body then item:add(R.payload, tvb(body, stop - body)) end
  if at + length + TRAILER_BYTES <= captured then item:add_le(R.trailer, tvb(at + length + 4, 4)) end
  return at + length + TRAILER_BYTES, name
end

function ring.dissector(tvb, pinfo, tree)
  pinfo.cols.protocol = "VMBus ring"
  set_ends(pinfo)
  local branch = tree:add(ring, tvb())
  local interface = interface_name()
  local relid = interface and tonumber(tostring(interface.value):match("channel (%d+)"))
  if relid then branch:add(R.relid, relid):set_generated() end
  local at, names = 0, {}
  while at and at + DESCRIPTOR_BYTES <= tvb:len() do
    local name
    at, name = add_packet(tvb, branch, at)
    names[#names + 1] = name
  end
  if tvb:reported_len() > tvb:len() then branch:add_proto_expert_info(cut) end
  local info = string.format("channel %s, %d bytes published", relid or "?", tvb:reported_len())
  if #names > 0 then info = info .. ": " .. table.concat(names, ", ") end
  pinfo.cols.info = info
  branch:append_text(", " .. info)
  return tvb:len()
end
